"""The memory that a piece of code takes on large files of zeros, measured in a process of its own."""

import subprocess
import sys
from pathlib import Path

from fedloom_common.tensors import encode_header


def zeros(folder: Path, tensor_bytes: int) -> Path:
    """A safetensors file with one fp32 tensor w of such a size, which takes no space on the disk."""
    path = folder / "zeros.safetensors"
    with path.open("wb") as file:
        file.write(encode_header([("w", "F32", (tensor_bytes // 4,))]))
        file.truncate(file.tell() + tensor_bytes)
    return path


def peak_bytes(code: str, path: Path) -> int:
    """Peak memory of a process that runs code in which ``path`` is a file."""
    told = "import resource; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)"
    whole = f"from pathlib import Path\npath = Path({str(path)!r})\n{code}\n{told}"
    answer = subprocess.run([sys.executable, "-c", whole], capture_output=True, text=True, check=True)
    return int(answer.stdout)
