"""One process of a bare transfer: the end that all sites talk to, or one site.

    bare_process.py server|site SETTING-AS-JSON

Says a line of JSON when it is ready. A site transfers one model for each line on its standard input, the
server looks at its sum; each answers with the CPU seconds since its last answer.
"""

import ctypes
import importlib
import json
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Kind = Literal["tcp sink", "tcp accumulate", "grpc upload", "grpc broadcast"]
ACCUMULATING: tuple[Kind, ...] = ("tcp accumulate", "grpc upload")
CHUNK_BYTES = 1 << 20

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_KEPT_BYTES = 32 << 20  # the most that glibc accepts for both


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What both ends must know."""

    kind: Kind
    model_bytes: int
    port: int
    credentials: str
    """Folder of a kit; empty without TLS."""

    def at(self, port: int) -> "Setting":
        """The same at a port."""
        return replace(self, port=port)

    def to_json(self) -> str:
        """One argument of a command line."""
        return json.dumps(asdict(self))


class Sum:
    """The server's side of a model: what came added up, or what is sent."""

    def __init__(self, setting: Setting) -> None:
        accumulates = setting.kind in ACCUMULATING
        self.values: NDArray[np.float32] = np.full(setting.model_bytes // 4, not accumulates, np.float32)

    def add(self, offset_bytes: int, piece: bytes | bytearray | memoryview, skip_bytes: int = 0) -> None:
        """Add a chunk, whose values begin after ``skip_bytes``, in its place."""
        came = np.frombuffer(piece, np.float32, offset=skip_bytes)
        place = self.values[offset_bytes // 4 :][: len(came)]
        np.add(place, came, out=place)


def main() -> None:
    """Be one end until standard input is closed."""
    role, setting = sys.argv[1], Setting(**json.loads(sys.argv[2]))
    _keep_freed_memory()
    ends = importlib.import_module("bare_tcp" if setting.kind.startswith("tcp") else "bare_grpc")
    if role == "server":
        held = Sum(setting)
        ends.serve(setting, held)
        # its work is done before it is asked
        _answer_each_line(dict, lambda: {"low": float(held.values.min()), "high": float(held.values.max())})
    else:
        transfer = ends.connect(setting)
        _answer_each_line(lambda: transfer() or {})


def _answer_each_line(
    work: Callable[[], Mapping[str, float]], facts: Callable[[], Mapping[str, float]] = dict
) -> None:
    """Say how much CPU time each piece of work took since the last answer, without that of the facts."""
    print("{}", flush=True)
    counted_s = time.process_time()
    for _ in sys.stdin:
        told = work()
        cpu_s = time.process_time() - counted_s
        print(json.dumps({"cpu_s": cpu_s, **told, **facts()}), flush=True)
        counted_s = time.process_time()


def _keep_freed_memory() -> None:
    """Have glibc keep what is freed: giving chunks back to the kernel is half of a server's system time."""
    libc = ctypes.CDLL(None)
    for option in (_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD):
        if not libc.mallopt(option, _KEPT_BYTES):
            raise SystemExit(f"mallopt does not take option {option}")


if __name__ == "__main__":
    main()
