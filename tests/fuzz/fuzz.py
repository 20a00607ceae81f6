"""Coverage-guided fuzzing: `make fuzz SECONDS=60`. What reaches new code is kept in the corpus.

Usage: fuzz.py TARGET [libFuzzer's options], or fuzz.py for all targets, each for SECONDS.
"""

import os
import subprocess
import sys
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["fedloom_common"]):
    from targets import TARGETS, seeds

CORPUS = Path(__file__).resolve().parent / "corpus"


def main() -> None:
    """Fuzz one target in this process, or each in one of its own; a find ends with status 1."""
    if len(sys.argv) > 1:
        target = TARGETS[sys.argv[1]]

        def once(data: bytes) -> None:
            target(data)

        atheris.Setup([sys.argv[0], *sys.argv[2:]], once)
        atheris.Fuzz()
    statuses = {name: _fuzz(name, os.environ.get("SECONDS_EACH", "60")) for name in TARGETS}
    sys.exit(any(statuses.values()))


def _fuzz(name: str, seconds: str) -> int:
    """Fuzz a target; what reaches new code is written to its corpus, and replaced where it can be shorter."""
    kept = CORPUS / name
    kept.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(seeds()[name]):
        (kept / f"seed-{number}").write_bytes(seed)
    options = ["-max_len=4096", f"-artifact_prefix={kept}/found-", f"-max_total_time={seconds}"]
    return subprocess.run([sys.executable, __file__, name, *options, kept], check=False).returncode


if __name__ == "__main__":
    main()
