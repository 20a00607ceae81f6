"""What native code writes to standard error, such as gRPC's core, as log lines; counts failed TLS handshakes.

gRPC tells of a failed handshake nowhere else: neither the server's Python side nor the client hears why.
"""

import atexit
import faulthandler
import logging
import os
import re
import sys
import threading
from dataclasses import dataclass, field

from fedloom_common.bursts import Bursts, untold_fact

REPEAT_S = 60.0  # whoever knocks all day fills no disk: one line a cause in this time, and the count

_ABSL = re.compile(r"(?P<level>[IWEF])\d{4} [\d:.]+ +\d+ (?P<file>[\w.-]+):\d+\] (?P<text>.*)")
_LEVELS = {"I": logging.INFO, "W": logging.WARNING, "E": logging.ERROR, "F": logging.CRITICAL}
_HANDSHAKE = re.compile(r"(?:Handshake failed with error|.*handshake failed)\W*(?P<reason>.*)", re.IGNORECASE)
_NOISE = re.compile(r"SSL_ERROR_\w+: |error:[0-9a-f]+:SSL routines:OPENSSL_internal:")

logger = logging.getLogger(__name__)


@dataclass
class Handshakes:
    """TLS handshakes that failed at this process's ports, as far as native code tells."""

    failed: int = 0
    _told: Bursts = field(default_factory=lambda: Bursts(1 / REPEAT_S, 1))

    def note(self, reason: str) -> None:
        """Count one, and log it unless its cause was logged a moment ago."""
        self.failed += 1
        if (untold := self._told.untold(reason)) is not None:
            logger.warning("TLS handshake failed", extra={"reason": reason} | untold_fact(untold))


handshakes = Handshakes()
"""Those of this process."""


def route_native_lines() -> None:
    """From here on, log what native code of this process writes to standard error.

    Call it before the logging is set up: Python keeps the real standard error. What the interpreter says of
    a fatal signal goes there too, and so does everything native at the process's end.
    """
    real = os.dup(2)
    sys.stderr = open(real, "w", buffering=1, errors="backslashreplace", closefd=False)  # noqa: SIM115
    reader, writer = os.pipe()
    os.dup2(writer, 2)
    os.close(writer)
    faulthandler.enable(real)
    atexit.register(os.dup2, real, 2)
    threading.Thread(target=_pass_on, args=(reader,), name="native-lines", daemon=True).start()


def _pass_on(reader: int) -> None:
    with open(reader, encoding="utf-8", errors="replace") as lines:
        for line in lines:
            log_native_line(line.rstrip())


def log_native_line(line: str) -> None:
    """Log one line as what it is."""
    match = _ABSL.fullmatch(line)
    if match is None:
        if line:
            logger.warning("native code wrote", extra={"line": line})
    elif handshake := _HANDSHAKE.fullmatch(match["text"]):
        handshakes.note(_NOISE.sub("", handshake["reason"]) or "no reason given")
    else:
        logging.getLogger("grpc").log(_LEVELS[match["level"]], match["text"], extra={"file": match["file"]})
