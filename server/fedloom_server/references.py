"""Which files the rows name by their digests: what a site may read, and what may not be removed."""

from collections.abc import Collection

from sqlalchemy import Select, select, tuple_
from sqlalchemy.orm import Session

from fedloom_server.adapters.parts import Parts
from fedloom_server.database import Database
from fedloom_server.records import Assignment, Round, Run


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


def part_digests_of(database: Database, models: Collection[str] | None, *, besides: str = "") -> set[str]:
    """Files that belong to some models, or to all, where adapters are trained; of all runs but one.

    What a run began with belongs to every model of it.
    """

    def look(session: Session) -> set[str]:
        runs = list(session.execute(select(Run.id, Run.adapter).where(Run.id != besides)))
        begun = {run_id: content for run_id, content in runs if content}
        found = [Parts.from_json(content) for content in begun.values()]
        rounds = select(Round.model_digest, Round.adapter).where(Round.run_id.in_(begun))
        for digest, content in session.execute(rounds) if begun else ():
            if models is None or digest in models:
                found.append(Parts.from_json(content))
        return {file.digest for parts in found for file in parts.files}

    return database.do(look)
