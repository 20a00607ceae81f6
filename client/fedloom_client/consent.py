"""Whether this site does what it is asked: its policy as it stands now, and what it has done today."""

import json
import logging
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from fedloom_client.config import Policy, SiteConfig
from fedloom_client.messages import Assignment
from fedloom_client.policy import (
    Circumstances,
    names_model,
    objections,
    refusal_of_alone,
    refusal_of_model,
    refusal_of_run,
    refusal_of_training,
)
from fedloom_client.statedir import StateDir
from fedloom_common.errors import BadSpec
from fedloom_common.files import write_text
from fedloom_common.mistakes import describe
from fedloom_common.runspec import RunSpec, parse_run_spec
from fedloom_common.yamltext import read_yaml

MOST_RUNS = 1000  # remembered as joined with a permitted model; the oldest is forgotten

MOST_DAYS = 7
ONLY_MEASURES = "trains is false in site.yaml: this site only measures models"

logger = logging.getLogger(__name__)


class Consent:
    """Judges assignments, and remembers those that it let begin."""

    def __init__(self, config: SiteConfig, state: StateDir) -> None:
        self._config = config
        self._trainings = Trainings(state.trainings)

    def refusal(self, assignment: Assignment, spec: RunSpec) -> str | None:
        """Why an assignment is refused before anything is downloaded; if it is not, it counts from now on."""
        try:
            policy = current_policy(self._config)
            return self._judge(policy, assignment, spec)
        except BadSpec as error:
            # What cannot be read permits nothing: neither the policy, nor how much was done today.
            logger.error("everything is refused", extra={"reason": str(error)})
            return str(error)

    def refusal_of_family(self, model_type: str) -> str | None:
        """Why a family of models is refused."""
        try:
            return refusal_of_model(model_type, policy=current_policy(self._config))
        except BadSpec as error:
            return str(error)

    def shares_failures(self) -> bool:
        """Whether the coordinator may be told all of why work failed."""
        try:
            return current_policy(self._config).failure_details
        except BadSpec:
            return False

    def _judge(self, policy: Policy, assignment: Assignment, spec: RunSpec) -> str | None:
        now, is_training = datetime.now(UTC), assignment.work != "evaluate"
        done = self._trainings.read(now)
        here = Circumstances(
            data_sets=self._config.data, now=now,
            config_digest=_config_digest(assignment), weights_digests=_weights_digests(assignment, spec),
            model_bytes=max(file.size_bytes for file in (*assignment.frozen, assignment.model)),
            joined_permitted=done.has_joined(assignment),
            trainings_today=len(set(done.today) - {assignment.id}),
        )  # fmt: skip
        reason = refusal_of_run(spec, policy, here)
        if is_training and not self._config.trains:
            reason = ONLY_MEASURES
        if reason is None and is_training:
            reason = refusal_of_training(policy, here)
        if reason is None and assignment.work == "alone":
            reason = refusal_of_alone(policy)
        is_named = names_model(policy, here)
        if reason is None and (is_training or is_named):
            done.add(assignment, is_training=is_training, is_named=is_named)
        return reason


def read_spec(path: Path) -> RunSpec:
    """The run spec in a file.

    Raises:
        BadSpec: it cannot be read.
    """
    try:
        return parse_run_spec(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise BadSpec(f"the run spec {path} cannot be read: {error}") from error


def foretell(config: SiteConfig, spec: RunSpec) -> list[str]:
    """Every reason for which this site would refuse a run now, as far as its spec tells.

    Raises:
        BadSpec: the policy or the record of trainings cannot be read.
    """
    policy, now = current_policy(config), datetime.now(UTC)
    done = Trainings(StateDir(config.state_dir).trainings).read(now)
    here = Circumstances(data_sets=config.data, trainings_today=len(set(done.today)), now=now)
    model_type = _family(spec)
    last = [
        None if config.trains or spec.evaluation.central else ONLY_MEASURES,
        refusal_of_model(model_type, policy=policy) if model_type else None,
        refusal_of_training(policy, here),
    ]
    return [*objections(spec, policy, here), *(reason for reason in last if reason)]


def judged_later(spec: RunSpec) -> str:
    """What of the model a run's spec leaves open, so that it is judged only when the run is there."""
    return "size and digests" if _family(spec) else "family, size and digests"


def _family(spec: RunSpec) -> str | None:
    """The model's family; None if only the coordinator's directory, ``model.path``, tells it."""
    return (spec.model.config or {}).get("model_type")


def current_policy(config: SiteConfig) -> Policy:
    """The policy as it stands now.

    Raises:
        BadSpec: its file is missing or wrong.
    """
    return config.policy if config.policy_file is None else read_policy(config.policy_file)


def read_policy(path: Path) -> Policy:
    """The policy in a file of its own.

    Raises:
        BadSpec: the file is missing or wrong.
    """
    try:
        text = path.read_text(encoding="utf-8")
        content = read_yaml(text, f"everything is refused: policy_file {path}")
        if not isinstance(content, dict):
            raise BadSpec(f"policy_file {path} is no mapping of rules; until it is, everything is refused")
        return Policy.model_validate(content)
    except (OSError, UnicodeDecodeError) as error:
        raise BadSpec(f"policy_file {path} cannot be read, so everything is refused: {error}") from error
    except ValidationError as error:
        mistakes = describe(error, Policy)
        raise BadSpec(f"policy_file {path} has mistakes, so everything is refused:\n{mistakes}") from error


class Trainings:
    """The trainings that have begun, in a file that outlives the daemon."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self, now: datetime) -> "Done":
        """What has been done, as of now.

        Raises:
            BadSpec: the file is damaged; to begin anew would permit more than the policy does.
        """
        try:
            content: Any = json.loads(self._path.read_text()) if self._path.exists() else {}
            days = {str(day): [str(name) for name in names] for day, names in content.get("days", {}).items()}
            joined = content.get("joined", {})
            if isinstance(joined, list):
                joined = {}  # the runs' names alone, as earlier releases kept them
            joined = {str(run): str(config) for run, config in joined.items()}
            return Done(self._path, f"{now:%Y-%m-%d}", days, joined)
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise BadSpec(
                f"{self._path} is damaged ({error}), so everything is refused; remove it if you know that "
                "policy.max_rounds_per_day is kept without it"
            ) from error


class Done:
    """The trainings of each of the last days, and the runs that were joined with a model the policy names."""

    def __init__(self, path: Path, day: str, days: dict[str, list[str]], joined: dict[str, str]) -> None:
        self._path = path
        self._day = day
        self._days = days
        self._joined = joined

    @property
    def today(self) -> list[str]:
        """Assignments whose training has begun since midnight UTC."""
        return self._days.get(self._day, [])

    def has_joined(self, assignment: Assignment) -> bool:
        """Whether the run was joined with a model that the policy named, and is still of that config.json.

        Weights change with every round, and no policy can name them all; what they are weights of does not.
        """
        return self._joined.get(assignment.run_id) == _config_digest(assignment)

    def add(self, assignment: Assignment, *, is_training: bool, is_named: bool) -> None:
        """Count an assignment, durably, before it begins."""
        if is_training and assignment.id not in self.today:
            self._days.setdefault(self._day, []).append(assignment.id)
        if is_named:
            self._joined.setdefault(assignment.run_id, _config_digest(assignment))
        # More days than one, as a clock that is set back and forth must not begin a day anew.
        days = {day: self._days[day] for day in sorted(self._days)[-MOST_DAYS:]}
        joined = dict([*self._joined.items()][-MOST_RUNS:])
        write_text(self._path, json.dumps({"days": days, "joined": joined}))


def _config_digest(assignment: Assignment) -> str:
    return next((file.digest for file in assignment.assets if file.name == "config.json"), "")


def _weights_digests(assignment: Assignment, spec: RunSpec) -> list[str]:
    """Of the model, and before it of the base under an adapter, which is what people know by its digest.

    Training reads no other frozen file as a model, and the last of one name: any more prove nothing.
    """
    bases = []
    if spec.model.adapter is not None:
        from fedloom_common.adapters.layout import BASE_FILE  # here: it brings numpy, an idle daemon none

        bases = [file.digest for file in assignment.frozen if file.name == BASE_FILE]
    return [*bases[-1:], assignment.model.digest]
