import os
from functools import partial

import numpy as np
import pytest
from pydantic import TypeAdapter
from safetensors.torch import load_file, save_file

from fedloom_common.codecs.chain import Chain
from fedloom_common.codecs.decoder import Decoder, decode_model
from fedloom_common.codecs.encoder import encode_model
from fedloom_common.codecs.spec import Codecs
from fedloom_common.codecs.values import PIECE_VALUES
from fedloom_common.tensorfiles import TensorFile

DIGEST = "blake3:" + "ab" * 32
CODECS = TypeAdapter(Codecs)


class Exchange:
    """A base model and one trained from it, in files of the safetensors library, and a chain to code them."""

    def __init__(self, folder, chain, base, trained):
        self.folder, self.chain = folder, Chain(CODECS.validate_python(chain))
        self.encoded = folder / "encoded.safetensors"
        self.base, self.trained = folder / "base.safetensors", folder / "trained.safetensors"
        save_file(base, self.base, {"format": "pt", "origin": "round 3"})
        save_file(trained, self.trained, {"format": "pt"})

    def encode(self, feedback=None):
        with TensorFile(self.base) as base, TensorFile(self.trained) as trained:
            encode_model(
                self.chain,
                trained=trained,
                base=base,
                base_digest=DIGEST,
                out=self.encoded,
                feedback=feedback,
            )
        return self

    def decode(self):
        return load_file(self.decode_file(self.base, self.folder / "decoded.safetensors"))

    def decode_file(self, held, out):
        with TensorFile(held) as base:
            decode_model(self.encoded, self.chain, base=base, base_digest=DIGEST, out=out)
        return out

    def check(self):
        with TensorFile(self.base) as base, self._decoder(base) as decoder:
            decoder.check()

    def changes(self):
        """Every change that the file tells, flat."""
        with TensorFile(self.base) as base, self._decoder(base) as decoder:
            names = [info.name for info in base.manifest.tensors if decoder.has_change(info.name)]
            return {name: self._all(decoder.read_change, base, name, np.float32) for name in names}

    def values(self, dtype=np.float32):
        """Every float tensor's values as a decoder reads them, flat."""
        with TensorFile(self.base) as base, self._decoder(base) as decoder:
            names = [info.name for info in base.manifest.tensors if info.is_float]
            return {name: self._all(decoder.read, base, name, dtype) for name in names}

    def pieces_backwards(self):
        """The same, read a piece at a time from the last to the first."""
        found = {}
        with TensorFile(self.base) as base, self._decoder(base) as decoder:
            for info in base.manifest.tensors:
                if info.is_float:
                    whole = found[info.name] = np.empty(_count(info), np.float32)
                    for start in reversed(range(0, len(whole), PIECE_VALUES)):
                        decoder.read(info.name, start, whole[start : start + PIECE_VALUES])
        return found

    def limit_bytes(self):
        with TensorFile(self.base) as base:
            return self.chain.limit_bytes(base.manifest)

    def _decoder(self, base):
        return Decoder(self.encoded, self.chain, base=base, base_digest=DIGEST)

    def _all(self, read, base, name, dtype):
        whole = np.empty(_count(base.manifest[name]), dtype)
        read(name, 0, whole)
        return whole


def _count(info):
    return int(np.prod(info.shape, dtype=np.int64))


@pytest.fixture(scope="session")
def exchange(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            os, "fsync", lambda descriptor: None
        )  # thousands of small files: nothing here cuts power
        yield partial(Exchange, tmp_path_factory.mktemp("codecs"))
