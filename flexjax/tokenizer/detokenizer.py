"""IncrementalDetokenizer: token ids to text, one at a time, never splitting a character.

All pieces together equal the text of decoding all ids at once, for any ids. Two families of tokenizers exist among
the models that are served, and each says where text is certain:

* byte-level: a token is a string of bytes, and text is their UTF-8 reading. Bytes wait until their character is
  complete or can no longer become one (then U+FFFD stands for them).
* byte fallback: a token is text, or one byte written ``<0xE2>``. A run of byte tokens becomes text only if the whole
  run is valid UTF-8, otherwise one U+FFFD a byte; so bytes wait until the run ends.
"""

import codecs
import json
import re

from tokenizers import Tokenizer

BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def byte_alphabet() -> dict[str, int]:
    """Character -> byte of byte-level tokens (GPT-2): printable Latin-1 stands for itself, the others for 256, ..."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


class ByteLevelText:
    """Text of byte-level tokens."""

    ALPHABET = byte_alphabet()

    def __init__(self):
        self._reader = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: str) -> str:
        return self._reader.decode(self.bytes_of(token))

    def flush(self) -> str:
        return self._reader.decode(b"", final=True)

    @classmethod
    def bytes_of(cls, token: str) -> bytes:
        codes = [cls.ALPHABET.get(character) for character in token]
        return token.encode() if None in codes else bytes(codes)


class ByteFallbackText:
    """Text of tokens in which a space is written ``space`` and bytes stand in for unknown characters.

    Args:
        space: the character that stands for a space.
        strip: spaces that the decoder takes off the beginning of the text.
    """

    def __init__(self, space: str, strip: int):
        self._space = space
        self._strip = strip
        self._run = bytearray()

    def push(self, token: str) -> str:
        byte = BYTE_TOKEN.fullmatch(token)
        if byte:
            self._run.append(int(byte[1], 16))
            return ""
        return self._stripped(self._end_run() + token.replace(self._space, " "))

    def flush(self) -> str:
        return self._stripped(self._end_run())

    def _end_run(self) -> str:
        run, self._run = bytes(self._run), bytearray()
        try:
            return run.decode()
        except UnicodeDecodeError:
            return "\N{REPLACEMENT CHARACTER}" * len(run)

    def _stripped(self, text: str) -> str:
        while self._strip and text:
            if text[0] != " ":
                self._strip = 0
                break
            text, self._strip = text[1:], self._strip - 1
        return text


class IncrementalDetokenizer:
    """The text of one growing sequence.

    Args:
        backend: the tokenizer; its decoder is byte-level or byte fallback (see `text_family`).
        skip_special_tokens: leave special tokens out of the text.
        continues_text: text stands before this one, so a leading space is kept that the decoder would strip.
    """

    def __init__(self, backend: Tokenizer, skip_special_tokens: bool = True, continues_text: bool = False):
        kind, strip = text_family(backend)
        self._text = ByteLevelText() if kind == "byte-level" else ByteFallbackText(kind, 0 if continues_text else strip)
        self._token_of = backend.id_to_token
        tokens = backend.get_added_tokens_decoder() if skip_special_tokens else {}
        self._skipped = {token_id for token_id, token in tokens.items() if token.special}

    def push(self, token_id: int) -> str:
        """New text after one more token; empty while a character is incomplete."""
        token = None if token_id in self._skipped else self._token_of(token_id)
        return "" if token is None else self._text.push(token)

    def flush(self) -> str:
        """Ends the sequence: what an incomplete character leaves (U+FFFD), or nothing."""
        return self._text.flush()


def token_bytes(kind: str, token: str) -> bytes:
    """The bytes of UTF-8 that a token stands for in the middle of a text; ``kind`` is the first of `text_family`."""
    if kind == "byte-level":
        return ByteLevelText.bytes_of(token)
    byte = BYTE_TOKEN.fullmatch(token)
    return bytes([int(byte[1], 16)]) if byte else token.replace(kind, " ").encode()


def text_family(backend: Tokenizer) -> tuple[str, int]:
    """("byte-level", 0), or for byte fallback (the character that stands for a space, leading spaces to strip).

    Raises:
        ValueError: the decoder is of neither family.
    """
    decoder = json.loads(backend.decoder.__getstate__()) if backend.decoder else {"type": None}
    steps = decoder.get("decoders", [decoder])
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        return "byte-level", 0
    if kinds[:3] == ["Replace", "ByteFallback", "Fuse"] and kinds[3:] in ([], ["Strip"]):
        strip = steps[3] if kinds[3:] else {"content": " ", "start": 0, "stop": 0}
        if steps[0]["content"] == " " and strip["content"] == " " and strip["stop"] == 0:
            return steps[0]["pattern"]["String"], strip["start"]
    raise ValueError(
        f"the tokenizer's decoder is {'+'.join(map(str, kinds))}; supported are ByteLevel and "
        "Replace+ByteFallback+Fuse[+Strip]"
    )
