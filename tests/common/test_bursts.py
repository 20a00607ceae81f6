from fedloom_common.bursts import KEPT_BUCKETS, Buckets, Bursts


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def test_a_bucket_gives_its_burst_and_then_its_rate() -> None:
    clock = Clock()
    buckets = Buckets(per_s=2, burst=3, clock=clock)
    assert [buckets.take("a") for _ in range(4)] == [0, 0, 0, 0.5]
    clock.now_s += 0.5
    assert [buckets.take("a") for _ in range(2)] == [0, 0.5]
    assert buckets.take("b") == 0
    clock.now_s += 1000
    assert [buckets.take("a") for _ in range(4)] == [0, 0, 0, 0.5]


def test_buckets_are_forgotten_only_when_they_are_full_again() -> None:
    clock = Clock()
    buckets = Buckets(per_s=1, burst=1, clock=clock)
    for number in range(KEPT_BUCKETS + 10):
        buckets.take(number)
    assert buckets.take(0) == 1
    clock.now_s += 2
    buckets.take("one more")
    assert len(buckets._filled) == KEPT_BUCKETS


def test_the_number_of_what_went_untold_is_told_with_the_next() -> None:
    clock = Clock()
    bursts = Bursts(per_s=50, burst=1, clock=clock)
    assert [bursts.untold("a") for _ in range(3)] == [0, None, None]
    clock.now_s += 0.05
    assert bursts.untold("a") == 2
    assert bursts.untold("b") == 0
