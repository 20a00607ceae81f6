"""What this site permits, as pure rules: each gives the reason for a refusal, or None."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, time

from fedloom_client.config import Policy, Privacy
from fedloom_common.runspec import Local, Plugin, RunSpec

DIGEST_SHOWN = len("blake3:") + 12
MOST_SHOWN = 3


@dataclass(frozen=True, kw_only=True)
class Circumstances:
    """What the rules look at besides the run spec."""

    data_sets: Collection[str]
    """Data sets of this site."""
    model_bytes: int = 0
    """Size of the model file; 0 if it is not known yet."""
    config_digest: str = ""
    """Of the model's config.json."""
    weights_digests: Sequence[str] = ()
    """Of the model file and the frozen ones; none if they are not known yet."""
    joined_permitted: bool = False
    """Whether the run's model was found permitted when this site joined the run."""
    trainings_today: int = 0
    """Trainings that have begun since midnight UTC, without this one."""
    now: datetime
    """In UTC."""


def refusal_of_run(spec: RunSpec, policy: Policy, here: Circumstances) -> str | None:
    """Why this site does not take part in a run, judged before anything is downloaded.

    A limit in steps refuses a run in epochs unless there is a limit in epochs too, and the other
    way round: how many steps an epoch has is known only after the data are packed.
    """
    return "; ".join(objections(spec, policy, here)) or None


def refusal_of_training(policy: Policy, here: Circumstances) -> str | None:
    """Why no training may begin now; evaluations may."""
    most, hours = policy.max_rounds_per_day, policy.hours_utc
    if most is not None and here.trainings_today >= most:
        return f"policy.max_rounds_per_day is {most}, {here.trainings_today} have begun today (UTC)"
    if hours is not None and not is_within(hours, here.now.time()):
        return f"policy.hours_utc is {hours}, it is {here.now:%H:%M} UTC"
    return None


def refusal_of_alone(policy: Policy) -> str | None:
    """Why this site does not train by itself for the report at a run's end."""
    return None if policy.alone else "policy.alone is false: this site does not train alone for the report"


def refusal_of_model(model_type: str, *, policy: Policy) -> str | None:
    """Why this site does not train a family of models."""
    if policy.model_types is None or model_type in policy.model_types:
        return None
    return f"policy.model_types permits {_listed(policy.model_types)}, the model is a {model_type}"


def names_model(policy: Policy, here: Circumstances) -> bool:
    """Whether ``policy.models`` names a model's config.json or weights; a tokenizer's files tell no model."""
    own = {here.config_digest, *here.weights_digests}
    return policy.models is not None and not own.isdisjoint(policy.models)


def is_within(hours: str, moment: time) -> bool:
    """Whether a moment lies in hours such as 20:00-06:00, from the first minute on to before the last."""
    begin, end = (time.fromisoformat(part) for part in hours.split("-"))
    moment = moment.replace(tzinfo=None)
    if begin <= end:
        return begin <= moment < end
    return moment >= begin or moment < end


def objections(spec: RunSpec, policy: Policy, here: Circumstances) -> Iterator[str]:
    """Every rule that a run breaks, and how."""
    if isinstance(spec.task, Plugin):
        if spec.task.name not in policy.task_plugins:
            permitted = _listed(policy.task_plugins)
            yield f"policy.task_plugins permits {permitted}, the run's task is the plug-in {spec.task.name}"
    elif spec.task.kind not in policy.tasks:
        yield f"policy.tasks permits {_listed(policy.tasks)}, the run's task is {spec.task.kind}"
    if spec.data not in here.data_sets:
        yield f"data has {_listed(here.data_sets)}, the run wants {spec.data}"
    elif policy.data_sets is not None and spec.data not in policy.data_sets:
        yield f"policy.data_sets permits {_listed(policy.data_sets)}, the run wants {spec.data}"
    if policy.max_model_bytes is not None and here.model_bytes > policy.max_model_bytes:
        yield f"policy.max_model_bytes is {policy.max_model_bytes}, the model has {here.model_bytes} bytes"
    is_known = not here.weights_digests or here.joined_permitted or names_model(policy, here)
    if policy.models is not None and not is_known:
        yield _wrong_model(policy.models, here)
    yield from _objections_to_amount(spec.local, policy)
    for stage in spec.transport.up:
        if policy.codecs is not None and stage.name not in policy.codecs:
            yield f"policy.codecs permits {_listed(policy.codecs)}, updates would leave as {stage.name}"
    if policy.privacy is not None:
        # Run specs have no privacy of their own yet: what a run cannot promise, it does not give.
        yield f"policy.privacy demands {_demands(policy.privacy)}, the run gives no privacy"


def _wrong_model(permitted: Sequence[str], here: Circumstances) -> str:
    # The run's digests whole, to be copied; the permitted ones in part, which stand in the site's policy:
    # the operator is shown the first 300 characters.
    shown = [digest[:DIGEST_SHOWN] + "…" for digest in permitted[:MOST_SHOWN]]
    more = [f"{len(permitted) - MOST_SHOWN} more"] if len(permitted) > MOST_SHOWN else []
    return (
        f"policy.models permits {', '.join([*shown, *more]) or 'nothing'}; this run's config.json is "
        f"{here.config_digest or 'missing'}, its weights {', '.join(here.weights_digests)}"
    )


def _objections_to_amount(local: Local, policy: Policy) -> Iterator[str]:
    most_steps, most_epochs = policy.max_steps_per_round, policy.max_epochs_per_round
    if local.steps is not None:
        if most_steps is not None and local.steps > most_steps:
            yield f"policy.max_steps_per_round is {most_steps}, the run wants {local.steps} steps"
        if most_steps is None and most_epochs is not None:
            yield f"policy.max_epochs_per_round is {most_epochs:g}, the run gives steps; give local.epochs"
    if local.epochs is not None:
        if most_epochs is not None and local.epochs > most_epochs:
            yield f"policy.max_epochs_per_round is {most_epochs:g}, the run wants {local.epochs:g} epochs"
        if most_epochs is None and most_steps is not None:
            yield f"policy.max_steps_per_round is {most_steps}, the run gives epochs; give local.steps"


def _demands(privacy: Privacy) -> str:
    parts = []
    if privacy.max_clip_norm is not None:
        parts.append(f"clipping to a norm of at most {privacy.max_clip_norm:g}")
    if privacy.min_noise_multiplier is not None:
        parts.append(f"noise of at least {privacy.min_noise_multiplier:g} times the clipping norm")
    return " and ".join(parts) or "some"


def _listed(names: Collection[str]) -> str:
    return ", ".join(sorted(names)) or "nothing"
