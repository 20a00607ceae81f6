"""Whether this site's daemon lives and is attached, in a file that ``fedloom client health`` reads."""

import json
import logging
import os
import time
from pathlib import Path

HEARTBEATS = 3  # a status older than so many heartbeats is that of a daemon that hangs or is gone

logger = logging.getLogger(__name__)


class Status:
    """The daemon's side of the status file; it is renewed at every heartbeat."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.trouble: str | None = "it has yet to attach"
        """Why there is no session; None while there is one."""

    def attached(self, site: str, heartbeat_s: float) -> None:
        """The session is open and this process lives."""
        self.trouble = None
        self._write({"attached": True, "site": site, "heartbeat_s": heartbeat_s})

    def detached(self, reason: str) -> None:
        """No session is open."""
        self.trouble = f"not attached to the coordinator: {reason}"
        self._write({"attached": False, "reason": reason})

    def _write(self, facts: dict[str, object]) -> None:
        text = json.dumps(facts | {"pid": os.getpid(), "at_s": time.time()})
        partial = self._path.with_name(".status.json.partial")
        try:
            partial.write_text(text)  # never synced: after a crash of the host no status is the right one
            partial.replace(self._path)
        except OSError as error:
            logger.warning(
                "the status file cannot be written", extra={"path": str(self._path), "error": str(error)}
            )


def ill_health(path: Path) -> str | None:
    """Why the daemon with this status file is not well; None if it lives and is attached."""
    try:
        status = json.loads(path.read_text())
    except FileNotFoundError:
        return f"no client daemon has run with this state_dir: {path} is missing"
    except (OSError, ValueError) as error:
        return f"{path} cannot be read: {error}"
    if not _lives(status["pid"]):
        return f"the client daemon (process {status['pid']}) is gone"
    if not status["attached"]:
        return f"the client daemon is not attached: {status['reason']}"
    age_s = time.time() - status["at_s"]
    if age_s > HEARTBEATS * status["heartbeat_s"]:
        return f"the client daemon is silent for {age_s:.0f} s, its heartbeat is {status['heartbeat_s']:g} s"
    return None


def is_running(path: Path) -> bool:
    """Whether the daemon with this status file is a process, attached or not."""
    try:
        return _lives(json.loads(path.read_text())["pid"])
    except (OSError, ValueError):
        return False


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
