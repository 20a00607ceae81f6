"""One coordinator a state: it owns its folder while it runs."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedloom_common.errors import WrongState


@contextmanager
def owned_folder(state_dir: Path) -> Iterator[None]:
    """Own a state folder inside the block; a kill ends it too.

    Raises:
        WrongState: another coordinator does.
    """
    state_dir.mkdir(parents=True, exist_ok=True)
    with (state_dir / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise WrongState(
                f"another coordinator uses {state_dir}; give each a state_dir of its own"
            ) from error
        yield
