"""What the tiny model answers in float64, by the formulas and with no code of the service's engine."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from flexjax.weights.peft import read_adapter
from tests.ladder import Model
from tests.tiny_model import CONFIG, byte_tokenizer

TOKENIZER = byte_tokenizer()
TOLERANCE = 1e-4
"""Of log-probabilities of up to about 20, which the service computes in float32."""


def text_ids(text: str) -> list[int]:
    """A token for each byte."""
    return TOKENIZER.encode(text).ids


def chat_ids(question: str) -> list[int]:
    """A conversation of one question, up to where the answer begins."""
    user, end, assistant = (TOKENIZER.token_to_id(name) for name in ("<user>", "<end>", "<assistant>"))
    return [user, *text_ids(question), end, assistant]


@dataclass(frozen=True)
class Answerer:
    """Attributes:
    factors: of an adapter, as the dense model takes them; None is the base model.
    """

    factors: dict | None = None
    scale: float = 1.0

    @classmethod
    def exported(cls, folder: Path) -> "Answerer":
        """By an adapter in PEFT's format."""
        adapter = read_adapter(folder, CONFIG)
        a, b = ({module: pair[index] for module, pair in adapter.weights.items()} for index in (0, 1))
        return cls({"a": a, "b": b}, adapter.scale)

    def logprobs(self, ids: list[int]) -> np.ndarray:
        """[T, vocab] of the token after each."""
        return Model.random(CONFIG).dense.logprobs(np.array(ids), self.factors, self.scale)

    def continuation(self, ids: list[int], count: int) -> list[int]:
        """The likeliest next tokens, one after another."""
        tokens = list(ids)
        for _ in range(count):
            tokens.append(int(self.logprobs(tokens)[-1].argmax()))
        return tokens[len(ids) :]

    def text(self, ids: list[int], count: int) -> str:
        return TOKENIZER.decode(self.continuation(ids, count))

    def own_logprobs(self, ids: list[int]) -> list[float]:
        """Of each token after those before it; of the first there is none."""
        return self.logprobs(ids)[np.arange(len(ids) - 1), ids[1:]].tolist()
