"""What this site permits, as pure rules: each gives the reason for a refusal, or None."""

from collections.abc import Collection, Iterator

from fedloom_client.config import Policy
from fedloom_common.runspec import Local, RunSpec


def refusal_of_run(
    spec: RunSpec, *, policy: Policy, data_sets: Collection[str], model_bytes: int
) -> str | None:
    """Why this site does not take part in a run, judged before anything is downloaded.

    A limit in steps refuses a run in epochs unless there is a limit in epochs too, and the other
    way round: how many steps an epoch has is known only after the data are packed.
    """
    return "; ".join(_objections(spec, policy, data_sets, model_bytes)) or None


def refusal_of_model(model_type: str, *, policy: Policy) -> str | None:
    """Why this site does not train a family of models."""
    if policy.model_types is None or model_type in policy.model_types:
        return None
    return f"policy.model_types permits {_listed(policy.model_types)}, the model is a {model_type}"


def _objections(spec: RunSpec, policy: Policy, data_sets: Collection[str], model_bytes: int) -> Iterator[str]:
    if spec.task.kind not in policy.tasks:
        yield f"policy.tasks permits {_listed(policy.tasks)}, the run's task is {spec.task.kind}"
    if spec.data not in data_sets:
        yield f"data has {_listed(data_sets)}, the run wants {spec.data}"
    if policy.max_model_bytes is not None and model_bytes > policy.max_model_bytes:
        yield f"policy.max_model_bytes is {policy.max_model_bytes}, the model has {model_bytes} bytes"
    yield from _objections_to_amount(spec.local, policy)


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


def _listed(names: Collection[str]) -> str:
    return ", ".join(sorted(names)) or "nothing"
