"""Encoded updates and models at the site: what goes up, what comes down, and what is left out."""

import asyncio
import json
import shutil
import threading
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from pydantic import TypeAdapter
from safetensors.numpy import load_file, save

from fedloom.v1 import session_pb2 as pb
from fedloom_client import cache as cache_module
from fedloom_client import uplink
from fedloom_client.residuals import Residuals
from fedloom_client.uplink import encode_update
from fedloom_common.codecs.chain import Chain
from fedloom_common.codecs.decoder import Decoder, decode_model
from fedloom_common.codecs.encoder import encode_model
from fedloom_common.codecs.spec import Codecs
from fedloom_common.tensorfiles import TensorFile
from fedloom_common.tensors import Manifest

VALUES = 3000
TOPK = [{"name": "topk", "fraction": 0.1}, "int8"]
BASE = np.random.default_rng(0).standard_normal(VALUES).astype(np.float32)


def change(round_: int) -> np.ndarray:
    return (np.random.default_rng(round_).standard_normal(VALUES) * 0.01).astype(np.float32)


def content(values: np.ndarray) -> bytes:
    return save({"w": values}, metadata={"format": "pt"})


def chain_of(stages: object) -> Any:
    return Chain(TypeAdapter(Codecs).validate_python(stages))


class Exchange:
    """A site with a real model, and what its coordinator makes of the updates."""

    def __init__(self, world: Any, transport: dict[str, object]) -> None:
        self.world, self.transport = world, transport
        self.model = world.coordinator.add_file("model.safetensors", content(BASE))
        self.residual = world.state / "runs" / "run-1" / "residual"

    def assignment(self, name: str, round_: int, **changes: Any) -> pb.Assignment:
        spec = {
            "name": "tiny",
            "model": {"config": {"model_type": "gpt2"}},
            "data": "plays",
            "rounds": 9,
            "local": {"steps": 5},
            "transport": self.transport,
        }
        facts = {"model": self.model, "round": round_, "spec_json": json.dumps(spec)}
        return self.world.assignment(name, **facts | changes)

    def trains(self, round_: int) -> np.ndarray:
        """What the next training changes, as it will be in fp32."""
        trained = BASE + change(round_)
        self.world.group.update = content(trained)
        return trained - BASE

    async def round(self, round_: int, **changes: Any) -> np.ndarray:
        self.trains(round_)
        self.world.coordinator.assign(self.assignment(f"r{round_}", round_, **changes))
        await self.world.coordinator.until(lambda: f"r{round_}" in self.world.coordinator.receipts)
        await self.settled()
        return self.told(f"r{round_}")

    def told(self, name: str) -> np.ndarray:
        """The change that an update tells."""
        folder = self.world.folder
        (folder / "model").write_bytes(content(BASE))
        (folder / "update").write_bytes(bytes(self.world.coordinator.spool[name]))
        values = np.empty(VALUES, np.float32)
        chain = chain_of(self.transport["up"])
        with (
            TensorFile(folder / "model") as base,
            Decoder(folder / "update", chain, base=base, base_digest=self.model.digest) as decoder,
        ):
            decoder.check()
            decoder.read_change("w", 0, values)
        return values

    def left_out(self) -> np.ndarray:
        """What the last update left, which has arrived."""
        return load_file(self.residual / "delivered.safetensors")["w"]

    async def settled(self) -> None:
        """Until it is known of every update whether what it left out counts."""
        async with asyncio.timeout(60):
            while (self.residual / "pending.safetensors").exists():  # noqa: ASYNC110 (a file tells nobody)
                await asyncio.sleep(0.01)


def assert_nothing_is_lost(exchange: Exchange, *rounds: int) -> None:
    """All that updates told, and what is kept, are all the changes that there were."""
    told = sum(exchange.told(f"r{number}").astype(np.float64) for number in rounds)
    wanted = sum((BASE + change(number) - BASE).astype(np.float64) for number in rounds)
    kept = exchange.left_out()
    assert np.abs(kept).max() > 1e-3
    np.testing.assert_allclose(told + kept, wanted, atol=1e-7)


async def test_an_update_is_sent_encoded_and_the_trained_model_does_not_stay(world: Any) -> None:
    exchange = Exchange(world, {"up": "int8"})
    world.daemon()
    await world.attached()
    told = await exchange.round(1)
    largest = np.abs(change(1)).max()
    np.testing.assert_allclose(told, change(1), atol=largest / 127 / 2 * 1.01)
    outcome = world.coordinator.kinds("outcome")[0]
    assert outcome.update_bytes == len(world.coordinator.spool["r1"]) < len(content(BASE)) / 3
    assert set(outcome.phase_seconds) == {"download", "train", "encode"}
    assert not exchange.residual.exists()


async def test_what_updates_leave_out_joins_the_next_ones(world: Any) -> None:
    exchange = Exchange(world, {"up": TOPK})
    world.daemon()
    await world.attached()
    for number in (1, 2, 3):
        await exchange.round(number)
    assert_nothing_is_lost(exchange, 1, 2, 3)


async def test_an_encoded_update_survives_a_restart_and_what_it_left_out_counts_after_it(world: Any) -> None:
    exchange = Exchange(world, {"up": TOPK})
    world.coordinator.grants = False
    daemon = world.daemon()
    await world.attached()
    exchange.trains(1)
    world.coordinator.assign(exchange.assignment("r1", 1))
    first = await world.coordinator.until_heard("outcome")
    await world.stop(daemon)
    assert not (exchange.residual / "delivered.safetensors").exists()
    world.coordinator.grants = True
    world.daemon()
    assert await world.coordinator.until_heard("outcome", 2) == first
    await world.coordinator.until(lambda: world.coordinator.receipts == ["r1"])
    await exchange.settled()
    assert len(world.group.orders) == 1
    await exchange.round(2)
    assert_nothing_is_lost(exchange, 1, 2)


@pytest.mark.parametrize("after_delivery", [False, True])
async def test_a_kill_after_the_receipt_lets_what_was_left_out_count_once(
    world: Any, monkeypatch: pytest.MonkeyPatch, after_delivery: bool
) -> None:
    exchange = Exchange(world, {"up": TOPK})
    daemon = world.daemon()
    await world.attached()
    exchange.trains(1)
    deliver, tried = Residuals.deliver, threading.Event()

    def killed(self: Residuals, run_id: str, assignment_id: str) -> None:
        if after_delivery:
            deliver(self, run_id, assignment_id)
        tried.set()
        raise asyncio.CancelledError

    with monkeypatch.context() as patch:
        patch.setattr(Residuals, "deliver", killed)
        world.coordinator.assign(exchange.assignment("r1", 1))
        await world.coordinator.until(lambda: world.coordinator.receipts == ["r1"])
        await world.until(tried.is_set)
        await world.stop(daemon)
    assert (exchange.residual / "delivered.safetensors").exists() is after_delivery
    beats = len(world.coordinator.kinds("heartbeat"))
    world.daemon()
    assert list((await world.attached(2)).open_assignments) == ["r1"]
    await world.coordinator.until_heard("heartbeat", beats + 1)
    counts = pb.Cancel(assignment_id="r1", reason="its update is here and counts", counts=True)
    world.coordinator.send(cancel=counts)
    await exchange.round(2)
    assert world.coordinator.receipts == ["r1", "r2"]
    assert len(world.group.orders) == 2
    assert_nothing_is_lost(exchange, 1, 2)


async def test_a_receipt_that_comes_late_counts_before_the_next_update_is_encoded(world: Any) -> None:
    exchange = Exchange(world, {"up": TOPK})
    world.coordinator.grants = False
    world.daemon()
    await world.attached()
    exchange.trains(1)
    world.coordinator.assign(exchange.assignment("r1", 1))
    await world.coordinator.until_heard("outcome")
    world.coordinator.write_errors = [(grpc.StatusCode.UNAVAILABLE, "later")] * 3
    world.coordinator.grants = True
    exchange.trains(2)
    world.coordinator.grant("r1")
    world.coordinator.assign(exchange.assignment("r2", 2))
    await world.coordinator.until(lambda: world.coordinator.receipts == ["r1", "r2"])
    await exchange.settled()
    assert_nothing_is_lost(exchange, 1, 2)


@pytest.mark.parametrize("is_killed", [False, True])
async def test_a_training_that_waits_for_an_earlier_update_survives_an_end(
    world: Any, is_killed: bool
) -> None:
    exchange, coordinator = Exchange(world, {"up": TOPK}), world.coordinator
    daemon = await wait_for_the_first(exchange)
    if is_killed:
        await world.until((world.state / "outbox" / "r2" / "trained.json").exists)
        world.state = shutil.copytree(world.state, world.folder / "killed")
        exchange.residual = world.state / "runs" / "run-1" / "residual"
    await world.stop(daemon)
    coordinator.write_errors = []
    second = coordinator.open.pop("r2")
    world.daemon()
    assert set((await world.attached(2)).open_assignments) == {"r1", "r2"}
    await coordinator.until(lambda: coordinator.receipts == ["r1"])
    coordinator.assign(second)
    await coordinator.until(lambda: coordinator.receipts == ["r1", "r2"])
    await exchange.settled()
    assert len(world.group.orders) == 2
    assert coordinator.kinds("outcome")[-1].examples == 12
    assert_nothing_is_lost(exchange, 1, 2)


async def wait_for_the_first(exchange: Exchange) -> asyncio.Task[None]:
    """Train twice with a first update that cannot be delivered, for which the second one then waits."""
    world, coordinator = exchange.world, exchange.world.coordinator
    coordinator.grants = False
    daemon: asyncio.Task[None] = world.daemon()
    await world.attached()
    exchange.trains(1)
    coordinator.assign(exchange.assignment("r1", 1))
    await coordinator.until_heard("outcome")
    coordinator.write_errors = [(grpc.StatusCode.UNAVAILABLE, "later")] * 1000
    coordinator.grants = True
    coordinator.grant("r1")
    exchange.trains(2)
    coordinator.assign(exchange.assignment("r2", 2))
    await coordinator.until(lambda: ("r2", "encode") in phases(coordinator))
    return daemon


def phases(coordinator: Any) -> set[tuple[str, str]]:
    names = {number: name.removeprefix("PHASE_").lower() for name, number in pb.Phase.items()}
    return {(said.assignment_id, names[said.phase]) for said in coordinator.kinds("progress")}


async def test_a_training_that_was_put_aside_goes_when_it_is_not_wanted_any_more(world: Any) -> None:
    exchange, coordinator = Exchange(world, {"up": TOPK}), world.coordinator
    daemon = await wait_for_the_first(exchange)
    await world.stop(daemon)
    coordinator.open.clear()
    world.daemon()
    await world.attached(2)
    for name in ("r1", "r2"):
        coordinator.send(cancel=pb.Cancel(assignment_id=name, reason="the round is over"))
    await world.until(lambda: not list((world.state / "outbox").iterdir()))


async def test_a_cancel_leaves_nothing_of_a_training_that_waits_for_an_earlier_update(world: Any) -> None:
    exchange, coordinator = Exchange(world, {"up": TOPK}), world.coordinator
    await wait_for_the_first(exchange)
    coordinator.send(cancel=pb.Cancel(assignment_id="r2", reason="the round is over"))
    await world.until(lambda: [path.name for path in (world.state / "outbox").iterdir()] == ["r1"])


async def test_a_training_that_waits_for_an_earlier_update_goes_on_beside_later_work(world: Any) -> None:
    exchange, coordinator = Exchange(world, {"up": TOPK}), world.coordinator
    await wait_for_the_first(exchange)
    await world.until((world.state / "outbox" / "r2" / "trained.json").exists)
    coordinator.assign(exchange.assignment("r3", 3))
    await coordinator.until(lambda: ("r3", "queued") in phases(coordinator))
    exchange.trains(3)
    coordinator.write_errors.clear()
    await coordinator.until(lambda: coordinator.receipts == ["r1", "r2", "r3"])
    await exchange.settled()
    assert_nothing_is_lost(exchange, 1, 2, 3)


async def test_a_training_survives_a_stop_that_its_encoding_outlasts(
    world: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    exchange, coordinator = Exchange(world, {"up": TOPK}), world.coordinator
    begun, may_end = threading.Event(), threading.Event()

    def slow(*arguments: Any, **named: Any) -> None:
        begun.set()
        may_end.wait()
        encode_update(*arguments, **named)

    daemon = world.daemon()
    await world.attached()
    exchange.trains(1)
    with monkeypatch.context() as patch:
        patch.setattr(uplink, "encode_update", slow)
        coordinator.assign(exchange.assignment("r1", 1))
        await world.until(begun.is_set)
        daemon.cancel()
        try:
            await world.until((world.state / "outbox" / "r1" / "trained.json").exists)
            # what lies there if the process ends now
            copy = shutil.copytree(world.state, world.folder / "cut off")
        finally:
            may_end.set()
        await world.stop(daemon)
    world.daemon(state_dir=copy)
    await coordinator.until(lambda: coordinator.receipts == ["r1"])
    await world.until((copy / "runs" / "run-1" / "residual" / "delivered.safetensors").exists)
    exchange.residual = copy / "runs" / "run-1" / "residual"
    assert len(world.group.orders) == 1
    assert_nothing_is_lost(exchange, 1)


async def test_a_given_up_update_leaves_no_trace_in_the_next(world: Any) -> None:
    exchange = Exchange(world, {"up": TOPK})
    world.daemon()
    await world.attached()
    await exchange.round(1)
    world.coordinator.grants = False
    exchange.trains(2)
    world.coordinator.assign(exchange.assignment("r2", 2))
    await world.coordinator.until_heard("outcome", 2)
    assert (exchange.residual / "pending.safetensors").exists()
    del world.coordinator.open["r2"]
    world.coordinator.send(cancel=pb.Cancel(assignment_id="r2", reason="too late"))
    await exchange.settled()
    assert not (exchange.residual / "pending.safetensors").exists()
    world.coordinator.grants = True
    await exchange.round(3)
    assert_nothing_is_lost(exchange, 1, 3)


async def test_a_rejected_update_leaves_no_trace_in_the_next(world: Any) -> None:
    exchange = Exchange(world, {"up": TOPK})
    world.daemon()
    await world.attached()
    world.coordinator.write_errors = [(grpc.StatusCode.INVALID_ARGUMENT, "not as the model")]
    exchange.trains(1)
    world.coordinator.assign(exchange.assignment("r1", 1))
    await world.coordinator.until(lambda: not world.coordinator.write_errors)
    await exchange.settled()
    assert list(exchange.residual.iterdir()) == []
    await exchange.round(2)
    assert_nothing_is_lost(exchange, 2)


@pytest.mark.parametrize("restarts", [False, True])
async def test_an_update_that_was_delivered_and_did_not_count_leaves_no_trace_in_the_next(
    world: Any, restarts: bool
) -> None:
    exchange = Exchange(world, {"up": TOPK})
    daemon = world.daemon()
    await world.attached()
    await exchange.round(1, counted_round=0)
    await exchange.round(2, counted_round=1)  # an attempt that fails; the next leaves this site out
    if restarts:
        await world.stop(daemon)
        world.daemon()
        await world.attached(2)
    await exchange.round(3, counted_round=1)
    assert_nothing_is_lost(exchange, 1, 3)
    await exchange.round(4, counted_round=3)
    assert_nothing_is_lost(exchange, 1, 3, 4)


async def test_a_round_tried_again_adds_what_was_left_out_before_it(world: Any) -> None:
    exchange = Exchange(world, {"up": TOPK})
    world.daemon()
    await world.attached()
    await exchange.round(1)
    await exchange.round(2, round=2, counted_round=1)
    await exchange.round(3, round=2, attempt=2, counted_round=1)
    assert_nothing_is_lost(exchange, 1, 3)


@pytest.mark.parametrize(
    ("up", "value", "reason"),
    [
        pytest.param("int8", np.nan, "tensor w", id="not-finite"),
        pytest.param("fp16", 1e6, "tensor w", id="out-of-range"),
    ],
)
async def test_what_cannot_be_encoded_is_a_failure_that_names_the_tensor(
    world: Any, up: str, value: float, reason: str
) -> None:
    exchange = Exchange(world, {"up": up})
    world.daemon()
    await world.attached()
    trained = BASE.copy()
    trained[17] = value
    world.group.update = content(trained)
    world.coordinator.assign(exchange.assignment("r1", 1))
    failure = await world.coordinator.until_heard("failure")
    assert reason in failure.reason
    assert "17" in failure.reason
    assert list((world.state / "outbox").iterdir()) == []


@pytest.mark.parametrize("missing_bytes", [0, 1])
async def test_room_for_the_update_and_what_it_leaves_out_is_checked_before_training(
    world: Any, monkeypatch: pytest.MonkeyPatch, missing_bytes: int
) -> None:
    exchange = Exchange(world, {"up": TOPK})
    (world.folder / "base").write_bytes(content(BASE))
    encoded = chain_of(TOPK).limit_bytes(Manifest.read(world.folder / "base"))
    wanted = cache_module.DISK_RESERVE_BYTES + len(content(BASE)) + encoded + 4 * VALUES
    usage = type("Usage", (), {"free": wanted - missing_bytes})
    world.daemon()
    await world.attached()
    monkeypatch.setattr(cache_module.shutil, "disk_usage", lambda folder: usage)
    exchange.trains(1)
    world.coordinator.assign(exchange.assignment("r1", 1))
    if missing_bytes:
        failure = await world.coordinator.until_heard("failure")
        assert "are wanted for the trained model, the update and what it leaves out" in failure.reason
        assert world.group.orders == []
    else:
        await world.coordinator.until(lambda: world.coordinator.receipts == ["r1"])


@pytest.mark.parametrize("may_resume", [False, True])
async def test_what_was_left_out_goes_with_the_run(world: Any, may_resume: bool) -> None:
    exchange = Exchange(world, {"up": TOPK})
    world.daemon()
    await world.attached()
    await exchange.round(1)
    left_out = exchange.residual / "delivered.safetensors"
    world.coordinator.send(run_ended=pb.RunEnded(run_id="run-1", may_resume=may_resume))
    await (asyncio.sleep(0.3) if may_resume else world.until(lambda: not left_out.exists()))
    assert left_out.exists() is may_resume


class Downward(Exchange):
    """A second model, told as its change against the first."""

    def __init__(self, world: Any, stages: object = "int8") -> None:
        super().__init__(world, {"down": stages})
        folder: Path = world.folder
        (folder / "base").write_bytes(content(BASE))
        (folder / "mean").write_bytes(content(BASE + change(1)))
        chain = chain_of(stages)
        with TensorFile(folder / "base") as base, TensorFile(folder / "mean") as mean:
            digest = self.model.digest
            encode_model(chain, trained=mean, base=base, base_digest=digest, out=folder / "d")
            decode_model(folder / "d", chain, base=base, base_digest=digest, out=folder / "next")
        self.next = world.coordinator.add_file("model.safetensors", (folder / "next").read_bytes())
        self.delta = self.delta_of((folder / "d").read_bytes())

    def delta_of(self, encoded: bytes) -> pb.Delta:
        file = self.world.coordinator.add_file("delta.safetensors", encoded)
        return pb.Delta(file=file, base_digest=self.model.digest)

    async def evaluates(self, name: str, **changes: Any) -> bytes:
        """The model that a site evaluates."""
        count = len(self.world.group.models)
        self.world.coordinator.assign(self.assignment(name, 1, work=pb.WORK_EVALUATE, **changes))
        await self.world.coordinator.until(
            lambda: any(heard.assignment_id == name for heard in self.world.coordinator.kinds("outcome"))
        )
        (model,) = self.world.group.models[count:]
        return bytes(model)

    def wanted(self) -> bytes:
        return self.world.coordinator.files[self.next.digest]

    def reads(self, blob: pb.Blob) -> int:
        return [digest for digest, _ in self.world.coordinator.reads].count(blob.digest)


@pytest.mark.parametrize("stages", ["int8", ["topk", "int4", "zstd"], "zstd"], ids=str)
@pytest.mark.parametrize("cache_models", [1, 3])
async def test_a_site_that_holds_the_base_fetches_only_the_change(
    world: Any, stages: object, cache_models: int
) -> None:
    way = Downward(world, stages)
    world.daemon(cache_models=cache_models)
    await world.attached()
    await way.evaluates("one")
    assert await way.evaluates("two", model=way.next, delta=way.delta) == way.wanted()
    assert (way.reads(way.next), way.reads(way.delta.file)) == (0, 1)
    kept = {path.name for path in (world.state / "models").iterdir()}
    assert len(kept) == min(cache_models, 2)
    assert not any(name.startswith(".") for name in kept)


async def test_a_site_without_the_base_fetches_the_whole_model(world: Any) -> None:
    way = Downward(world)
    world.daemon()
    await world.attached()
    assert await way.evaluates("two", model=way.next, delta=way.delta) == way.wanted()
    assert (way.reads(way.next), way.reads(way.delta.file)) == (1, 0)


def cut(encoded: bytes) -> bytes:
    return encoded[:-10]


def flipped(encoded: bytes) -> bytes:
    return encoded[:-10] + bytes([encoded[-10] ^ 1]) + encoded[-9:]


def garbage(encoded: bytes) -> bytes:
    return b"no tensors at all" * 20


@pytest.mark.parametrize("spoil", [cut, flipped, garbage])
async def test_a_change_that_is_of_no_use_is_made_good_by_the_whole_model(
    world: Any, caplog: pytest.LogCaptureFixture, spoil: Any
) -> None:
    way = Downward(world)
    encoded = world.coordinator.files[way.delta.file.digest]
    world.daemon()
    await world.attached()
    await way.evaluates("one")
    bad = way.delta_of(spoil(encoded))
    assert await way.evaluates("two", model=way.next, delta=bad) == way.wanted()
    assert (way.reads(way.next), way.reads(bad.file)) == (1, 1)
    assert "of no use" in caplog.text
    assert not list((world.state / "models").glob(".*"))


async def test_a_change_that_the_coordinator_no_longer_keeps_is_made_good_by_the_whole_model(
    world: Any,
) -> None:
    way = Downward(world)
    world.daemon()
    await world.attached()
    await way.evaluates("one")
    del world.coordinator.files[way.delta.file.digest]
    assert await way.evaluates("two", model=way.next, delta=way.delta) == way.wanted()


async def test_a_change_as_large_as_the_model_is_not_fetched(world: Any) -> None:
    way = Downward(world)
    world.daemon()
    await world.attached()
    await way.evaluates("one")
    large = way.delta_of(world.coordinator.files[way.delta.file.digest] + bytes(len(way.wanted())))
    assert await way.evaluates("two", model=way.next, delta=large) == way.wanted()
    assert way.reads(large.file) == 0


async def test_a_change_against_no_model_at_all_is_refused(world: Any) -> None:
    way = Downward(world)
    world.daemon()
    await world.attached()
    delta = pb.Delta(file=way.delta.file, base_digest="../../etc/passwd")
    world.coordinator.assign(way.assignment("r1", 1, model=way.next, delta=delta))
    failure = await world.coordinator.until_heard("failure")
    assert "the delta's base is '../../etc/passwd'" in failure.reason
