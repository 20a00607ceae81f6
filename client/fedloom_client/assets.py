"""What may come along with a model: its config and the files of its tokenizer."""

import json
from collections.abc import Sequence
from pathlib import Path

from fedloom_client.messages import Blob
from fedloom_common.digests import has_digest
from fedloom_common.errors import ProtocolError

# what configs and tokenizers are made of: nothing that runs
ASSET_SUFFIXES = (".json", ".txt", ".model", ".jinja")
ASSETS_LIMIT = 64
ASSETS_LIMIT_BYTES = 256 << 20  # the largest tokenizers have a tenth of it


def check_assets(blobs: Sequence[Blob]) -> None:
    """Check that assets are what they should be, before any of them is fetched.

    Raises:
        ProtocolError: says which file, and what is allowed.
    """
    names = [blob.name for blob in blobs]
    for name in names:
        if name.startswith(".") or "/" in name or "\\" in name or "\0" in name or len(name) > 128:
            raise ProtocolError(f"asset name {name!r} is not a plain file name")
        if not name.endswith(ASSET_SUFFIXES):
            raise ProtocolError(f"asset {name!r} is not allowed; wanted one of *{', *'.join(ASSET_SUFFIXES)}")
    if len(set(names)) < len(names) or len(names) > ASSETS_LIMIT or "config.json" not in names:
        raise ProtocolError(
            f"a model needs up to {ASSETS_LIMIT} assets with different names, config.json among them; "
            f"came {len(names)}: {', '.join(names[:ASSETS_LIMIT])}"
        )
    total_bytes = sum(blob.size_bytes for blob in blobs)
    if total_bytes > ASSETS_LIMIT_BYTES:
        raise ProtocolError(f"the assets have {total_bytes} bytes, the limit is {ASSETS_LIMIT_BYTES}")


def are_intact(blobs: Sequence[Blob], folder: Path) -> bool:
    """Whether a folder holds these files as they were sent."""
    return all(has_digest(folder / blob.name, blob.digest) for blob in blobs)


def model_type(assets: Path) -> str:
    """The family of the model that config.json describes.

    Raises:
        ProtocolError: the file is not a model's config.
    """
    try:
        kind = json.loads((assets / "config.json").read_text())["model_type"]
    except (ValueError, KeyError, TypeError) as error:
        raise ProtocolError(f"the model's config.json names no model_type: {error}") from error
    return str(kind)
