"""Submission: a prompt on its way to the engine."""

import queue
from typing import NamedTuple

from flexjax.request import SamplingParams


class Submission(NamedTuple):
    """A prompt for `Engine.submit_all`; see `Engine.submit`.

    Attributes:
        cache_salt: it reuses cached prefixes only of submissions with the same one.
    """

    prompt: list[int]
    sampling: SamplingParams | None
    adapter: str | None
    listener: queue.SimpleQueue
    priority: int = 0
    cache_salt: str = ""
