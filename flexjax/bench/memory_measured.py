"""Measured activation memory: what a finetuning job takes above the weights while it has the device to itself.

What is counted, and how, is `flexjax.bench.step_memory.MemoryWatch`'s.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from flexjax.bench.coserve_engine import FinetuningRows
from flexjax.bench.coserve_run import begin, require_sound
from flexjax.bench.memory_ablation import lean_plan
from flexjax.bench.step_memory import MemoryWatch
from flexjax.bench.step_setup import ALWAYS
from flexjax.compiler.rematerialization import backward_work
from flexjax.config import EngineConfig
from flexjax.engine.engine import Engine
from flexjax.engine.machine import platform_of
from flexjax.engine.startup import dimensions_of
from flexjax.finetuning.job import FinetuneJob
from flexjax.layout import PAGE_TOKENS
from flexjax.models.build import dtype_of
from flexjax.state import padded_rank
from flexjax.weights.source import open_model

JOB = "memory"
EPOCHS = 10_000
LOOK_SECONDS = 0.005


def measured_memory(
    model: Path,
    modules: Sequence[str],
    tokens: int,
    *,
    rank: int,
    window: int,
    seconds: float,
    engine: Mapping,
    show: Callable,
) -> MemoryWatch:
    """Finetune on sequences of so many tokens, one at a time, for some seconds, with the tape of `lean_plan`.

    Args:
        model: directory with a configuration; the weights are random.
        tokens: a multiple of ``window``, which is one of 64.
        engine: further fields of `EngineConfig`; they win.
    """
    job = memory_job(open_model(str(model)).config.vocab_size, modules, tokens, rank)
    config = replace(memory_config(model, modules, tokens, rank, window), **engine)
    with Engine(config, show) as running:
        handles, watch = begin(running, [job]), MemoryWatch(running, JOB)
        until = time.monotonic() + seconds
        while time.monotonic() < until or not watch.pages:
            require_sound((), handles)
            watch.look()
            time.sleep(LOOK_SECONDS)
        running.loop.call(watch.count_arrays)
        handles[0].cancel()
    return watch


def memory_job(vocabulary: int, modules: Sequence[str], tokens: int, rank: int) -> FinetuneJob:
    return FinetuneJob(
        name=JOB,
        data=FinetuningRows([tokens] * 8, vocabulary, 1.0),
        rank=rank,
        target_modules=tuple(modules),
        learning_rate=1e-6,
        epochs=EPOCHS,
        batch_size=1,
    )


def memory_config(model: Path, modules: Sequence[str], tokens: int, rank: int, window: int) -> EngineConfig:
    """An engine whose pool holds one sequence and no more."""
    config = EngineConfig(
        model=str(model),
        policy="finetune_only",
        max_model_len=tokens,
        microbatch_tokens=tokens,
        backward_window=window,
        chunk_sizes=(tokens,),
        max_rows=8,
        row_sizes=(8,),
        max_adapters=1,
        adapter_rank_capacity=padded_rank(rank),
        max_running_jobs=1,
        **ALWAYS,
    )
    shape = open_model(config.model).config
    tape = lean_plan(backward_work(shape, modules, dtype_of(config.dtype), mean_context=tokens // 2), shape).names
    dims = dimensions_of(config.resolved(tokens, platform_of(config)), shape, tape)
    pages = max(dims.microbatch_pages(tokens // PAGE_TOKENS), dims.context_pages)
    return replace(config, tape=tape, pages=pages)
