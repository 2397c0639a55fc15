"""CoserveSetup: the engine, the finetuning job and the prompts of a plan. It replays nothing."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from flexjax.bench.coserve_plan import JOB, CoservePlan
from flexjax.bench.coserve_trace import Trace
from flexjax.bench.replay import ReplayedRequest
from flexjax.bench.step_model import write_model
from flexjax.bench.step_setup import ALWAYS
from flexjax.bench.step_traffic import greedy
from flexjax.config import EngineConfig, from_table
from flexjax.engine.engine import Engine
from flexjax.engine.submission import Submission
from flexjax.fields import ConfigError
from flexjax.finetuning.job import FinetuneJob
from flexjax.layout import PAGE_TOKENS, tiles_for
from flexjax.state import padded_rank

EPOCHS = 1000
"""More than any run holds; the job is cancelled."""

LEARNING_RATE = 1e-6

WINDOW = 256
"""Slots of a backward unit unless [engine] says."""


@dataclass(frozen=True)
class CoserveSetup:
    """Attributes:
    engine_table: the [engine] table of the configuration; base: folder that its paths are relative to.
    trace: its longest request decides the engine's length unless the table does; None without requests.
    lengths: tokens of the finetuning sequences.
    folder: for files of this run.
    """

    plan: CoservePlan
    engine_table: Mapping[str, Any]
    base: Path
    trace: Trace | None
    lengths: Sequence[int]
    folder: Path

    def engine_config(self, policy: str) -> EngineConfig:
        """What the plan needs, then the table, which wins.

        Raises:
            ConfigError: the table chooses the policy, or a request or a sequence does not fit the engine.
        """
        own = {**self.engine_table, **self.plan.engines.get(policy, {})}
        chosen = [name for name in ("policy", "policy_options") if name in own]
        if chosen:
            raise ConfigError(f"[engine] has {' and '.join(chosen)}; set policy and policy_options of [bench]")
        table = {**ALWAYS, **self._needed(own), **own}
        name, options = self.plan.engine_policy(policy)
        table |= {"policy": name, "policy_options": options}
        if "model" not in table:
            table["model"] = str(write_model(self.folder / self.plan.shape, self.plan.shape, self.plan.layers))
        config = from_table(EngineConfig, table, "[engine]", self.base)
        self._check_lengths(config)
        return config

    def jobs(self, vocabulary: int) -> list[FinetuneJob]:
        """Jobs that go on for ever, with real updates."""
        first = self._first_job(vocabulary)
        return [first, *(replace(first, name=name, **own) for name, own in self.plan.more_jobs.items())]

    def _first_job(self, vocabulary: int) -> FinetuneJob:
        return FinetuneJob(
            name=JOB,
            data=FinetuningRows(self.lengths, vocabulary, self.plan.trained_share),
            rank=self.plan.rank,
            target_modules=self.plan.target_modules,
            learning_rate=LEARNING_RATE,
            schedule="constant",
            epochs=EPOCHS,
            batch_size=self.plan.batch_sequences or 1,
            batch_tokens=self.plan.batch_tokens,
            optimizer="adamw",
        )

    def _needed(self, own: Mapping[str, Any]) -> dict[str, Any]:
        """Lengths, and places for the adapters served and those trained."""
        plan, jobs = self.plan, 1 + len(self.plan.more_jobs)
        ranks = [plan.rank] * (plan.adapters + 1) + [own.get("rank", plan.rank) for own in plan.more_jobs.values()]
        window = own.get("backward_window", WINDOW)
        longest = max(max(self.lengths), self.trace.longest if self.trace else 0)
        return {
            "max_model_len": tiles_for(longest) * PAGE_TOKENS,
            "backward_window": window,
            "microbatch_tokens": -(-max(self.lengths) // window) * window,
            "max_adapters": len(ranks),
            "adapter_rank_capacity": sum(map(padded_rank, ranks)),
            "max_running_jobs": jobs,
            f"{plan.objective}_objective_ms": plan.objective_ms,
            "ttft_objective_ms": plan.ttft_objective_ms,
        }

    def _check_lengths(self, config: EngineConfig) -> None:
        room, sequence = config.max_model_len, max(self.lengths)
        if self.trace is not None and self.trace.longest > room:
            raise ConfigError(
                f"{self.trace.name} has a request of {self.trace.longest} tokens; max_model_len of [engine] is {room}: "
                "raise it, or leave it out"
            )
        for name, most in (("max_model_len", room), ("microbatch_tokens", config.microbatch_tokens)):
            if sequence > most:
                raise ConfigError(
                    f"a finetuning sequence has {sequence} tokens; {name} of [engine] is {most}: raise it or leave it "
                    "out, or cut sequences off with longest of [bench]"
                )


@dataclass(frozen=True)
class FinetuningRows:
    """Rows of random token ids; the last ``trained_share`` of each has a loss, at least one token, never the first.

    They are made as they are read, every time the same: millions of numbers in lists would be searched for garbage
    while requests wait.
    """

    lengths: Sequence[int]
    vocabulary: int
    trained_share: float

    def __iter__(self) -> Iterator[dict]:
        random = np.random.default_rng(0)
        for length in self.lengths:
            trained = max(1, min(length - 1, round(self.trained_share * length)))
            ids = random.integers(0, self.vocabulary, length).tolist()
            yield {"input_ids": ids, "loss_mask": [False] * (length - trained) + [True] * trained}


class Feed:
    """The requests of a trace as an engine takes them: fresh uniform random token ids, greedy, outputs of exactly the
    length asked for.

    Args:
        adapters: row i of the file asks adapter i modulo their number; (None,) asks the base model.
        seed: another one makes other prompts.
    """

    def __init__(self, engine: Engine, trace: Trace, adapters: Sequence[str | None], seed: int = 0):
        self._engine, self._adapters = engine, adapters
        ends = np.cumsum([row.prompt for row in trace.rows]).tolist()
        self._ends = {row.index: end for row, end in zip(trace.rows, ends, strict=True)}
        self._ids = np.random.default_rng(seed).integers(0, engine.model.vocab_size, ends[-1], np.int32)

    def submit(self, requests: Sequence[ReplayedRequest]) -> list[list[int]]:
        """For `Replay`; the prompt of each request is its `TraceRow`."""
        return self._engine.submit_all([self._submission(each) for each in requests])

    def _submission(self, request: ReplayedRequest) -> Submission:
        row = request.prompt
        end = self._ends[row.index]
        prompt = self._ids[end - row.prompt : end].tolist()
        return Submission(prompt, greedy(row.output), self._adapters[row.index % len(self._adapters)], request)
