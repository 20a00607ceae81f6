"""The tokenizer ``bytes``: one token for each of the 256 bytes of UTF-8, and one that ends a text."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"


def byte_tokenizer(**special_tokens: str) -> PreTrainedTokenizerFast:
    """A tokenizer whose token ids are the text's UTF-8 bytes; 256 ends a text, further ones are special.

    There is no padding token unless it is among those: models freeze its embedding, and nothing pads packed
    examples.
    """
    tokenizer = Tokenizer(models.BPE(vocab=_bytes_as_text(), merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
        **special_tokens,
    )


def _bytes_as_text() -> dict[str, int]:
    """Each byte under the visible character by which byte-level tokenizers write it.

    Source: GPT-2's encoder: visible Latin-1 characters stand for themselves,
    the other bytes for the characters from U+0100 on, in order.
    """
    visible = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    hidden = [byte for byte in range(256) if byte not in visible]
    characters = {byte: chr(byte) for byte in visible} | {
        byte: chr(256 + place) for place, byte in enumerate(hidden)
    }
    return {characters[byte]: byte for byte in range(256)}
