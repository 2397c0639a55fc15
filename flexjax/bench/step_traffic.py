"""Traffic: prompts of random tokens handed to the engine all at once, and when their answers came."""

import threading
import time
from collections.abc import Sequence
from itertools import cycle

import numpy as np

from flexjax.engine.engine import Engine
from flexjax.engine.submission import Submission
from flexjax.request import RequestOutput, SamplingParams


class Answer:
    """What one request felt. The engine tells it about every token through ``put``.

    Attributes:
        ids: of the request.
        times: seconds on `time.perf_counter` at which each token came.
    """

    def __init__(self):
        self.ids: list[int] = []
        self.times: list[float] = []
        self._ended, self._output = threading.Event(), None

    def put(self, output: RequestOutput) -> None:
        """On the engine's thread."""
        self.times.extend([time.perf_counter()] * (len(output.token_ids) - len(self.times)))
        if output.finish_reason is not None:
            self._output = output
            self._ended.set()

    @property
    def ended(self) -> bool:
        return self._ended.is_set()

    def wait(self) -> "Answer":
        """Block until the request has ended. Raises RuntimeError if the engine failed."""
        self._ended.wait()
        if self._output.error is not None:
            raise RuntimeError(f"a request ended with {self._output.finish_reason}: {self._output.error}")
        return self


def random_prompts(lengths: Sequence[int], vocabulary: int, seed: int) -> list[list[int]]:
    """Uniform token ids, so that no prefix repeats."""
    random = np.random.default_rng(seed)
    return [random.integers(0, vocabulary, length).tolist() for length in lengths]


def greedy(tokens: int) -> SamplingParams:
    """Exactly so many tokens, each the likeliest."""
    return SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False)


def submit_together(
    engine: Engine,
    prompts: Sequence[list[int]],
    outputs: Sequence[int],
    adapters: Sequence[str | None] = (None,),
) -> list[Answer]:
    """Hand over all prompts in one turn of the engine.

    Args:
        outputs: tokens of each answer.
        adapters: used in turn.
    """
    answers = [Answer() for _ in prompts]
    each = zip(prompts, map(greedy, outputs), cycle(adapters), answers)
    for answer, ids in zip(answers, engine.submit_all([Submission(*parts) for parts in each]), strict=True):
        answer.ids = ids
    return answers


def cancel(engine: Engine, answers: Sequence[Answer]) -> None:
    """End what has not ended."""
    engine.cancel([each for answer in answers for each in answer.ids])
    for answer in answers:
        answer.wait()
