"""The draw of a round's cohort: what selection policies may know, read from the store and the sites."""

import asyncio
from collections.abc import Collection

from fedloom_common.runspec import Async, RunSpec
from fedloom_server.eligibility import Wanted
from fedloom_server.records import Round, Run
from fedloom_server.selection import Draw, cohort_size, known_weights, select
from fedloom_server.sites import Sites
from fedloom_server.store import Store


def wanted(spec: RunSpec) -> Wanted:
    """What a run wants of a site."""
    return Wanted(data=spec.data, require=spec.cohort.require, central=spec.evaluation.central)


def sites_needed(run: Run) -> int:
    """How many sites must fit for a run to go on; without rounds the first to return makes a beginning."""
    begun = isinstance(run.spec.mode, Async) and run.rounds_done > 0
    return 1 if begun else run.spec.cohort.min_sites


async def draw_cohort(
    run: Run, record: Round, fitting: Collection[str], *, store: Store, sites: Sites, count: int | None = None
) -> tuple[str, ...]:
    """The sites that take part in a round's attempt, by name; ``count`` of them if given.

    Raises:
        TooFewUpdates: fewer sites fit than ``cohort.min_sites``.
        BadSpec: the policy is not there, or picks other than it was asked to.
    """
    spec = run.spec
    # A long run has a long history: it is read beside the loop.
    history = await asyncio.to_thread(store.training_history, run.id, (record.number, record.attempt))
    draw = Draw(
        sites=tuple(sorted(fitting)),
        count=cohort_size(spec.cohort, len(fitting)) if count is None else min(count, len(fitting)),
        seed=spec.seed,
        round=record.number,
        attempt=record.attempt,
        weights=known_weights(
            fitting,
            {site: examples for site, _, examples in history},
            {site: sites.data_bytes(site, spec.data) for site in fitting},
        ),
        last_picked={site: when for site, when, _ in history},
    )
    cohort = spec.cohort
    if count is not None:  # the caller has seen to it that others take part besides
        cohort = cohort.model_copy(update={"min_sites": min(cohort.min_sites, draw.count)})
    return select(draw, cohort)
