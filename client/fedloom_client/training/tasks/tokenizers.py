"""The tokenizer that came with a run's model."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from fedloom_client.training.tasks.protocol import BadRecord
from fedloom_common.errors import TrainingFailed


class Assets:
    """The files beside a model: its tokenizer's, and config.json. Loaded when first asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._tokenizer: Any = None

    @property
    def tokenizer(self) -> Any:
        """The tokenizer.

        Raises:
            TrainingFailed: it does not load.
        """
        if self._tokenizer is None:
            try:
                self._tokenizer = AutoTokenizer.from_pretrained(
                    str(self.folder), trust_remote_code=False, local_files_only=True
                )
            except Exception as error:  # so does tokenizers, and no kind of it, of a newer version's file
                raise TrainingFailed(f"the model's tokenizer does not load: {error}") from error
        return self._tokenizer

    @property
    def tokens(self) -> int:
        """One more than the largest number of a token: numbers may have gaps."""
        numbers: Mapping[str, int] = self.tokenizer.get_vocab()
        return max(numbers.values()) + 1

    def token(self, name: str, what: str) -> int:
        """The number of a special token, such as ``eos_token``; ``what`` tells people what it is.

        Raises:
            TrainingFailed: the tokenizer has none.
        """
        number = getattr(self.tokenizer, f"{name}_id")
        if number is None:
            raise TrainingFailed(f"the model's tokenizer has no {what} ({name})")
        return int(number)

    def encode(self, texts: Sequence[str]) -> Sequence[Sequence[int]]:
        """The tokens of each text, without special ones."""
        encoded = self.tokenizer(
            list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False
        )
        tokens: Sequence[Sequence[int]] = encoded["input_ids"]
        return tokens

    @property
    def padding(self) -> int:
        """The token that fills up a batch: the model's, for some find a text's end by it. -1 is none.

        Raises:
            TrainingFailed: neither the model nor the tokenizer has one.
        """
        known = (self.config.get("pad_token_id"), self.tokenizer.pad_token_id)
        number = next((number for number in known if number is not None and number >= 0), None)
        return self.token("eos_token", "token to fill batches up with") if number is None else int(number)

    @property
    def config(self) -> dict[str, Any]:
        """The model's config."""
        config: dict[str, Any] = json.loads((self.folder / "config.json").read_text())
        return config

    def digest(self) -> str:
        """Changes whenever a file of the tokenizer does."""
        digest = hashlib.sha256()
        for file in sorted(self.folder.iterdir()):
            if file.is_file() and file.name != "config.json":
                content = file.read_bytes()
                digest.update(f"{file.name} {len(content)} ".encode() + content)
        return digest.hexdigest()


def refuse_remote_code(assets: Path) -> None:
    """Check that no file asks for Python code that came with the model.

    Raises:
        TrainingFailed: a file has an auto_map.
    """
    for name in ("config.json", "tokenizer_config.json"):
        file = assets / name
        if file.is_file() and "auto_map" in json.loads(file.read_text()):
            raise TrainingFailed(
                f"the model's {name} has an auto_map, which asks to run code that came with the model: sites "
                "never do; use a model type that transformers itself has"
            )


def bytes_of_tokens(tokenizer: Any) -> list[int]:
    """How many bytes of text each token stands for, by its number; 0 for special tokens.

    Byte-level tokenizers write one character for each byte; those of SentencePiece write a space as ▁, and
    bytes that they have no character for as <0x00>; WordPiece marks what goes on with a word. Added tokens
    are written as they are by all of them.
    """
    special, added = set(tokenizer.all_special_ids), tokenizer.added_tokens_decoder
    decoder = _decoder(tokenizer)
    is_byte_level = '"ByteLevel"' in json.dumps(decoder)
    prefix = decoder.get("prefix", "") if decoder.get("type") == "WordPiece" else ""
    numbers: dict[str, int] = tokenizer.get_vocab()
    sizes = [0] * (max(numbers.values()) + 1)
    for token, number in numbers.items():
        if number in special:
            continue
        if number in added:
            sizes[number] = len(added[number].content.encode())
        else:
            sizes[number] = len(token) if is_byte_level else _written_bytes(token.removeprefix(prefix))
    return sizes


def _decoder(tokenizer: Any) -> dict[str, Any]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    decoder: dict[str, Any] | None = None if backend is None else json.loads(backend.to_str())["decoder"]
    return decoder or {}


def _written_bytes(token: str) -> int:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return 1
    return len(token.replace("▁", " ").encode())


def text_of(record: Mapping[str, Any], field: str) -> str:
    """A field that holds text.

    Raises:
        BadRecord: it holds something else.
    """
    value = record[field]
    if not isinstance(value, str):
        raise BadRecord(f"its {field} is {type(value).__name__}, wanted text")
    return value


def encode_up_to(most: int, tokenizer: Any, text: str, *, as_target: bool = False) -> tuple[list[int], bool]:
    """At most so many tokens of a text, with the special ones around it; whether it lost some."""
    given = {"text_target" if as_target else "text": text, "return_attention_mask": False, "verbose": False}
    whole: list[int] = tokenizer(**given)["input_ids"]
    if len(whole) <= most:
        return whole, False
    return list(tokenizer(**given, truncation=True, max_length=most)["input_ids"]), True
