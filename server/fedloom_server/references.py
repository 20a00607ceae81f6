"""Which files the rows name by their digests: what a site may read, and what may not be removed."""

from collections.abc import Collection
from typing import Any

from sqlalchemy import Select, Text, cast, false, or_, select, tuple_
from sqlalchemy.orm import Session

from fedloom_server.adapters.parts import Parts
from fedloom_server.database import Database
from fedloom_server.records import Assignment, Round, Run

FEW_FILES = 32  # more are found sooner by reading every adapter than by looking for each in its text


def names_to(database: Database, site: str, digest: str) -> bool:
    """Whether an assignment of a site names a file: as its model, its delta or an asset of its run."""
    mine = select(Assignment).where(Assignment.site == site).subquery()
    of_model = select(mine.c.id).where(mine.c.model_digest == digest)
    told = select(Round.run_id, Round.model_digest).where(Round.delta_digest == digest)
    of_delta = select(mine.c.id).where(tuple_(mine.c.run_id, mine.c.model_digest).in_(told))
    runs = select(mine.c.run_id)
    assets = select(Run.assets).where(Run.id.in_(runs))
    adapters = (
        select(Run.adapter).where(Run.id.in_(runs)),
        select(Round.adapter).where(Round.run_id.in_(runs)),
    )

    def look(session: Session) -> bool:
        if any(session.scalar(query.limit(1)) is not None for query in (of_model, of_delta)):
            return True
        if any(file["digest"] == digest for files in session.scalars(assets) for file in files):
            return True
        return any(
            file.digest == digest
            for query in adapters
            for content in session.scalars(query)
            for file in Parts.from_json(content).files
        )

    return database.do(look)


def named_by(database: Database, *queries: Select[str]) -> set[str]:
    """What queries for digests find, all at one moment."""
    return database.do(lambda session: {name for query in queries for name in session.scalars(query)})


def part_digests_of(database: Database, models: Collection[str]) -> set[str]:
    """Files that belong to some models where adapters are trained, and all that runs began with.

    What a run began with belongs to every model of it.
    """
    of_rounds = select(Round.adapter).where(Round.model_digest.in_(models))
    return _parts_in(database, select(Run.adapter), of_rounds)


def parts_among(database: Database, digests: Collection[str], *, besides: str) -> set[str]:
    """Those of some files that belong to a model of any run but one, where adapters are trained."""
    of_runs = select(Run.adapter).where(Run.id != besides)
    of_rounds = select(Round.adapter).where(Round.run_id != besides)
    if len(digests) <= FEW_FILES:
        of_rounds = of_rounds.where(or_(false(), *(cast(Round.adapter, Text).contains(d) for d in digests)))
    return _parts_in(database, of_runs, of_rounds).intersection(digests)


def _parts_in(database: Database, *queries: Select[dict[str, Any]]) -> set[str]:
    """Files in the adapters that queries find, all at one moment."""

    def look(session: Session) -> set[str]:
        found = (Parts.from_json(content) for query in queries for content in session.scalars(query))
        return {file.digest for parts in found for file in parts.files}

    return database.do(look)
