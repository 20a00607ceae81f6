"""The initial model of a run, made in a short-lived child process.

transformers and the model take hundreds of megabytes that the coordinator
should not hold for the rest of its life, so nothing here imports them:
``python -m fedloom_server.models FOLDER`` reads a run spec from standard input
and says on standard output what went wrong.
"""

import asyncio
import contextlib
import json
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from fedloom_common.errors import BadSpec, FederationError, StorageFull
from fedloom_common.runspec import RunSpec

MODEL_FILE = "model.safetensors"

_ERRORS: dict[str, type[FederationError]] = {"BadSpec": BadSpec, "StorageFull": StorageFull}
_TOLD_LINES = 15
# Nothing is fetched from the network, and one thread keeps the same seed giving the same bytes everywhere.
_ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}


@dataclass(frozen=True, kw_only=True)
class Remarks:
    """What an operator should know of an initial model that is good enough to begin with."""

    drawn: tuple[str, ...] = ()
    """Tensors that a pretrained model lacked and that were drawn from the seed."""
    is_of_another_tokenizer: bool = False
    """Whether the model was trained with the ids of a tokenizer that is not the run's."""


async def prepare_model(spec: RunSpec, into: Path) -> Remarks:
    """Fill an empty or missing folder with the model that ``spec.model`` describes.

    The files are model.safetensors with each storage once, config.json, the
    tokenizer's, and generation_config.json if the model generates: what
    ``from_pretrained`` of the task's class and ``AutoTokenizer`` load. The same
    spec gives the same bytes. After a failure the folder's content is of no use.

    Raises:
        BadSpec: the spec names a model that does not exist or cannot be built or trained on.
        StorageFull: the folder's file system has no space left.
    """
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "fedloom_server.models", str(into),
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        env=os.environ | _ENVIRONMENT,
    )  # fmt: skip
    try:
        answer, log = await child.communicate(spec.model_dump_json().encode())
    finally:
        if child.returncode is None:  # the caller was cancelled
            child.kill()
            await child.wait()
    if child.returncode != 0:
        raise _failure(child.returncode, answer.decode(errors="replace"), log.decode(errors="replace"))
    said = json.loads(answer)
    return Remarks(drawn=tuple(said["drawn"]), is_of_another_tokenizer=said["is_of_another_tokenizer"])


def _failure(status: int | None, answer: str, log: str) -> FederationError:
    """What the child said before it ended."""
    if answer:
        said = json.loads(answer)
        return _ERRORS[said["error"]](said["message"])
    last_lines = "\n".join(log.strip().splitlines()[-_TOLD_LINES:]) or "(it said nothing)"
    if status == -9:
        last_lines += "\nIt was killed: most likely this host has too little memory for the model."
    return FederationError(
        f"the process that makes the initial model ended with status {status}. Its last lines:\n{last_lines}"
    )


def main() -> int:
    """The child: its exit status, after a known failure's name and message on standard output."""
    try:
        with contextlib.redirect_stdout(sys.stderr):  # libraries print; standard output is for the answer
            from fedloom_server.givenfolder import is_of_another_tokenizer
            from fedloom_server.initialmodel import write_model

            spec = RunSpec.model_validate_json(sys.stdin.read())
            drawn = tuple(write_model(spec, Path(sys.argv[1])))
            remarks = Remarks(drawn=drawn, is_of_another_tokenizer=is_of_another_tokenizer(spec))
    except (BadSpec, StorageFull) as error:
        json.dump({"error": type(error).__name__, "message": str(error)}, sys.stdout)
        return 1
    json.dump(asdict(remarks), sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
