"""How much an update counts that started from an older global model."""


def staleness_factor(versions: int, exponent: float) -> float:
    """(1 + τ)^−a  for an update that is τ ``versions`` behind: 1 if it is fresh, less the older it is.

    The factor scales an update's change and not its share of the mean, which stays nₖ/n: a buffer in
    which all are stale makes a smaller step. Divided by the factors' sum they would cancel out there.

    Source: Xie et al. 2019, arXiv:1903.03934, the polynomial s_a(τ); Nguyen et al. 2022,
    arXiv:2106.06639, which takes a = 1/2 and divides by the number of updates.
    """
    assert versions >= 0, f"{versions} versions behind: the update is of a model that is yet to come"
    return float((1 + versions) ** -exponent)
