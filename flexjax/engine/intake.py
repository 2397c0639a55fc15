"""Intake: prompts become requests that the loop serves. It encodes no text and waits for no answer."""

import itertools
import random
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace

from flexjax.config import EngineConfig
from flexjax.engine.adapter_library import AdapterLibrary
from flexjax.engine.adapters import AdapterVersion
from flexjax.engine.batch import Serving
from flexjax.engine.compilation import LayoutOffer
from flexjax.engine.loop import Loop
from flexjax.engine.outputs import Collector
from flexjax.engine.submission import Submission
from flexjax.request import Request
from flexjax.tokenizer import Tokenizer


class Intake:
    """Any thread may submit.

    Args:
        stop_token_ids: that end an answer, unless a request ignores the end of sequence.
        tokenizer: for the text of answers; None: they have none.
    """

    def __init__(
        self,
        config: EngineConfig,
        stop_token_ids: frozenset[int],
        tokenizer: Tokenizer | None,
        loop: Loop,
        library: AdapterLibrary,
        layouts: LayoutOffer,
    ):
        self._max_model_len, self._stop_token_ids, self._tokenizer = config.max_model_len, stop_token_ids, tokenizer
        self._loop, self._library, self._layouts = loop, library, layouts
        self._ids, self._random = itertools.count(1), random.Random(config.seed)

    def submit(self, submissions: Sequence[Submission]) -> Future:
        """Queue submissions, each with its sampling, between the same two iterations, or none of them. The ids of each
        one's requests, or why the engine's thread refused, are in the future.

        Raises:
            ValueError: a prompt is empty or too long.
        """
        for sampling in {each.sampling for each in submissions}:
            self._layouts.requests(sampling)
        made = [[self._request(each) for _ in range(each.sampling.n)] for each in submissions]
        return self._loop.post(self._add_all, submissions, made)

    def _request(self, submission: Submission) -> Request:
        prompt, sampling = submission.prompt, submission.sampling
        room = self._max_model_len - len(prompt)
        if not prompt or room < 1:
            raise ValueError(
                f"the prompt has {len(prompt)} tokens; it needs 1 to {self._max_model_len - 1}, since "
                f"max_model_len is {self._max_model_len}"
            )
        stops = frozenset(sampling.stop_token_ids)
        return Request(
            id=next(self._ids),
            prompt=tuple(prompt),
            sampling=sampling,
            max_new_tokens=min(room, sampling.max_tokens or room),
            stop_token_ids=stops if sampling.ignore_eos else stops | self._stop_token_ids,
            priority=submission.priority,
            arrival=self._loop.clock(),
            cache_salt=submission.cache_salt,
        )

    def _add_all(self, submissions: Sequence[Submission], made: Sequence[list[Request]]) -> list[list[int]]:
        """On the engine's thread: pin each adapter's newest version and queue the requests, or queue none."""
        versions = [self._library.table.find(each.adapter) for each in submissions]
        for version, new in zip(versions, made, strict=True):
            self._library.tier.require_possible(version)
            self._loop.scheduler.require_possible(replace(new[0], adapter_version=version.version))
        for submission, version, new in zip(submissions, versions, made, strict=True):
            self._add_requests(new, version, submission)
        return [[request.id for request in new] for new in made]

    def _add_requests(self, new: list[Request], version: AdapterVersion, submission: Submission) -> None:
        for index, request in enumerate(new):
            request = replace(request, adapter_version=version.version)
            seed = request.sampling.seed
            seed = self._random.getrandbits(32) if seed is None else (seed + index) & 0xFFFFFFFF
            serving = Serving(request, version, seed, list(request.prompt))
            self._loop.add_request(serving, Collector(request, index, self._tokenizer, submission.listener))
