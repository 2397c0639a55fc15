"""Log-probabilities as OpenAI's two APIs show them, from entries that map token ids to values."""

from collections.abc import Sequence
from typing import Any

from flexjax.tokenizer import Tokenizer

LEAST = -9999.0
"""Shown for a token that cannot come, whose log-probability JSON has no number for (vLLM's choice)."""

Entry = dict[int, float] | None


class TokenTexts:
    """Tokens in words; without a tokenizer ``token_id:5``, as vLLM has it."""

    def __init__(self, tokenizer: Tokenizer | None):
        self._tokenizer = tokenizer

    def text(self, token_id: int) -> str:
        return f"token_id:{token_id}" if self._tokenizer is None else self._tokenizer.token_text(token_id)

    def bytes(self, token_id: int) -> list[int] | None:
        """What the token adds to the text's UTF-8; a part of a character is shown exactly."""
        return None if self._tokenizer is None else list(self._tokenizer.token_bytes(token_id))


class TextPlaces:
    """Where each token's text begins in the text of a choice, in characters.

    Args:
        prompt: token ids that the text follows, or of the prompt that it begins with (``echo``).
    """

    def __init__(self, tokenizer: Tokenizer | None, skip_special_tokens: bool, prompt: Sequence[int] = ()):
        self._place = 0
        self._detokenizer = None if tokenizer is None else tokenizer.detokenizer(prompt, skip_special_tokens)

    def take(self, token_ids: Sequence[int]) -> list[int]:
        """Places of the next tokens."""
        places = []
        for token_id in token_ids:
            places.append(self._place)
            self._place += 0 if self._detokenizer is None else len(self._detokenizer.push(token_id))
        return places


def completion_logprobs(
    texts: TokenTexts, places: TextPlaces, token_ids: Sequence[int], entries: Sequence[Entry]
) -> dict[str, list]:
    """The ``logprobs`` of a completion's choice; the entry of a text's first token may be None."""
    return {
        "tokens": [texts.text(each) for each in token_ids],
        "token_logprobs": [
            None if entry is None else shown(entry[each]) for each, entry in zip(token_ids, entries, strict=True)
        ],
        "top_logprobs": [None if entry is None else by_text(texts, entry) for entry in entries],
        "text_offset": places.take(token_ids),
    }


def by_text(texts: TokenTexts, entry: dict[int, float]) -> dict[str, float]:
    """Of tokens with the same text (parts of characters) the most likely stays."""
    values: dict[str, float] = {}
    for token_id, value in entry.items():
        text = texts.text(token_id)
        values[text] = max(shown(value), values.get(text, LEAST))
    return values


def chat_logprobs(
    texts: TokenTexts, token_ids: Sequence[int], entries: Sequence[dict[int, float]], count: int
) -> dict[str, Any]:
    """The ``logprobs`` of a chat's choice, with the ``count`` most likely tokens at every place."""
    content = []
    for token_id, entry in zip(token_ids, entries, strict=True):
        top = [token_object(texts, each, value) for each, value in list(entry.items())[:count]]
        content.append(token_object(texts, token_id, entry[token_id]) | {"top_logprobs": top})
    return {"content": content, "refusal": None}


def token_object(texts: TokenTexts, token_id: int, value: float) -> dict[str, Any]:
    return {"token": texts.text(token_id), "logprob": shown(value), "bytes": texts.bytes(token_id)}


def shown(value: float) -> float:
    return max(value, LEAST)
