"""Tokenizer: text to token ids and back, and conversations to training rows. It knows no model and no weights."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import tokenizers

from flexjax.tokenizer.chat_template import ChatTemplate
from flexjax.tokenizer.detokenizer import IncrementalDetokenizer, text_family, token_bytes
from flexjax.tokenizer.gguf_vocabulary import backend_from_gguf, special_tokens_from_gguf


class Tokenizer:
    """A `tokenizers.Tokenizer` with its special tokens and chat template.

    Args:
        backend: turns text into ids and back.
        special_tokens: such as ``{"bos_token": "<s>", "eos_token": "</s>"}``; absent ones do not exist.
        chat_template: Jinja source, or None.

    Raises:
        ValueError: the decoder cannot be streamed exactly, or the chat template is not valid.
    """

    def __init__(self, backend: tokenizers.Tokenizer, special_tokens: dict[str, str], chat_template: str | None = None):
        self._kind, _ = text_family(backend)
        self._backend = backend
        self._special_tokens = special_tokens
        self._chat_template = ChatTemplate(chat_template, special_tokens) if chat_template else None
        self.bos_token_id: int | None = self._id_of("bos_token")
        self.eos_token_id: int | None = self._id_of("eos_token")

    @classmethod
    def from_directory(cls, path: str | Path) -> "Tokenizer":
        """Reads ``tokenizer.json`` and, where they exist, ``tokenizer_config.json`` and ``chat_template.jinja``.

        Raises:
            FileNotFoundError: there is no ``tokenizer.json``.
            ValueError: a file is not what its name says.
        """
        path = Path(path)
        file = path / "tokenizer.json"
        if not file.is_file():
            raise FileNotFoundError(f"no tokenizer.json in {path}; other kinds of tokenizers are not supported")
        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"{file} is not a tokenizer: {error}") from error
        backend.no_truncation()
        backend.no_padding()
        config = read_json(path / "tokenizer_config.json")
        return cls(backend, special_tokens_of(config, path), chat_template_of(config, path))

    @classmethod
    def from_gguf(cls, metadata: dict) -> "Tokenizer":
        """From the ``tokenizer.*`` keys of a GGUF file.

        Raises:
            ValueError: the vocabulary is of a kind, or its pre-tokenizer has a name, that is not implemented.
        """
        backend = backend_from_gguf(metadata)
        return cls(backend, special_tokens_from_gguf(metadata), metadata.get("tokenizer.chat_template"))

    @property
    def vocabulary_size(self) -> int:
        """Number of token ids, special ones included. A model's vocabulary may be padded beyond it."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    @property
    def has_chat_template(self) -> bool:
        return self._chat_template is not None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text; ``add_special_tokens`` puts those around it that the model expects (such as BOS)."""
        return self._backend.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, token_ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        return self._backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    def token_text(self, token_id: int) -> str:
        """One token as text, special or not, for showing log-probabilities; U+FFFD for part of a character."""
        return self._backend.decode([token_id], skip_special_tokens=False)

    def token_bytes(self, token_id: int) -> bytes:
        """What one token, special or not, adds to the UTF-8 of a text; nothing for an id without a token."""
        token = self._backend.id_to_token(token_id)
        return b"" if token is None else token_bytes(self._kind, token)

    def detokenizer(self, prompt_ids: Iterable[int] = (), skip_special_tokens: bool = True) -> IncrementalDetokenizer:
        """A new incremental detokenizer for text that follows a prompt."""
        follows = bool(self.decode(prompt_ids, skip_special_tokens=True))
        return IncrementalDetokenizer(self._backend, skip_special_tokens, continues_text=follows)

    def render_chat(self, messages: list[dict], add_generation_prompt: bool = True, **variables) -> str:
        """A conversation as text.

        Raises:
            ValueError: the model has no chat template, or it refuses the messages.
        """
        return self._template().render(messages, add_generation_prompt, **variables)

    def apply_chat_template(self, messages: list[dict], add_generation_prompt: bool = True, **variables) -> list[int]:
        """A conversation as token ids (`render_chat`, encoded; the template writes BOS itself where it wants one)."""
        return self.encode(self.render_chat(messages, add_generation_prompt, **variables), add_special_tokens=False)

    def assistant_mask(
        self, messages: list[dict], learned: Sequence[bool] | None = None
    ) -> tuple[list[int], list[int]]:
        """A conversation as a training row.

        Args:
            learned: which messages of an assistant are targets, one for each message; None is all.

        Returns:
            Token ids, and per token 1 if it is a target: the assistant's text and the token that ends its turn, not
            the header before it nor white space after it. A token that begins in the header is not a target.

        Raises:
            ValueError: there is no chat template, or it cannot tell the assistant's text apart.
        """
        text, spans = self._template().assistant_spans(messages, learned)
        encoding = self._backend.encode(text, add_special_tokens=False)
        mask = [0] * len(encoding.ids)
        starts = [start for start, _ in encoding.offsets]
        for first, end in spans:
            inside = [token for token, start in enumerate(starts) if first <= start < end]
            for token in self._up_to_end_of_turn(encoding, inside, text[:end]):
                mask[token] = 1
        return encoding.ids, mask

    def _up_to_end_of_turn(self, encoding: tokenizers.Encoding, inside: list[int], text: str) -> list[int]:
        """Those tokens of a span that a served model would make: none after the special token that ends the turn."""
        special = {token_id for token_id, token in self._backend.get_added_tokens_decoder().items() if token.special}
        ends = [place for place, token in enumerate(inside) if encoding.ids[token] in special]
        if ends and not text[encoding.offsets[inside[ends[-1]]][1] :].strip():
            return inside[: ends[-1] + 1]
        return inside

    def _template(self) -> ChatTemplate:
        if self._chat_template is None:
            raise ValueError(
                "the model has no chat template; give prompts as text, or put a chat_template.jinja beside its "
                "tokenizer.json"
            )
        return self._chat_template

    def _id_of(self, name: str) -> int | None:
        token = self._special_tokens.get(name)
        return None if token is None else self._backend.token_to_id(token)


def read_json(file: Path) -> dict:
    """The object in a JSON file; an absent file is an empty object."""
    if not file.is_file():
        return {}
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from error


def special_tokens_of(config: dict, path: Path) -> dict[str, str]:
    """``bos_token`` and the like, from ``tokenizer_config.json`` or the older ``special_tokens_map.json``."""
    values = read_json(path / "special_tokens_map.json") | config
    texts = {name: value.get("content") if isinstance(value, dict) else value for name, value in values.items()}
    return {name: text for name, text in texts.items() if name.endswith("_token") and isinstance(text, str)}


def chat_template_of(config: dict, path: Path) -> str | None:
    """``chat_template.jinja`` before ``tokenizer_config.json``; of several named templates the one called default."""
    file = path / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):
        template = {named["name"]: named["template"] for named in template}.get("default")
    return template
