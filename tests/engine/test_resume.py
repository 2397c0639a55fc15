"""Jobs that are stopped and resumed end as if they had never been stopped: to the bit under a pinned policy."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from flexjax.fields import ConfigError
from tests.engine.conftest import ROWS, job

ROOT = Path(__file__).resolve().parents[2]
PINNED = dict(policy="fixed_budget", policy_options={"finetune_tokens": 128, "backward_units": 4})
SETTINGS = dict(epochs=20, checkpoint_every=2, dropout=0.1, validation=list(ROWS[:2]), evaluate_every=3)

KILLED = """
import json, sys
from flexjax import Engine, EngineConfig, FinetuneJob

settings, job = json.loads(sys.argv[1])
if __name__ == "__main__":
    with Engine.from_config(EngineConfig(**settings)) as engine:
        handle = engine.finetune(FinetuneJob(**job))
        while handle.wait(timeout=0.005) in ("queued", "running"):
            print(len([e for e in handle.events() if e["type"] == "checkpoint"]), flush=True)
"""


def finish(engine, resume: bool):
    handle = engine.finetune(job("lasting", **SETTINGS), resume=resume)
    assert handle.wait(timeout=120) == "succeeded", handle.error
    return engine.adapter("lasting").weights, handle


@pytest.fixture(scope="module")
def uninterrupted(new_engine):
    with new_engine(**PINNED) as engine:
        weights, handle = finish(engine, resume=False)
        return weights, handle.losses


def assert_same(weights, expected) -> None:
    for name in expected:
        for mine, theirs in zip(weights[name], expected[name], strict=True):
            np.testing.assert_array_equal(mine, theirs, err_msg=name)


def test_a_closed_engine_leaves_a_checkpoint_to_go_on_from(new_engine, tmp_path, uninterrupted):
    expected, losses = uninterrupted
    with new_engine(**PINNED, checkpoint_dir=str(tmp_path)) as engine:
        handle = engine.finetune(job("lasting", **SETTINGS))
        while len(handle.losses) < 3:
            assert handle.wait(timeout=0.01) in ("queued", "running"), handle.error
    assert handle.status == "cancelled"
    with new_engine(**PINNED, checkpoint_dir=str(tmp_path)) as engine:
        with pytest.raises(ConfigError, match="holds checkpoints of a job named 'lasting'"):
            engine.finetune(job("lasting", **SETTINGS))
        with pytest.raises(ConfigError, match="learning_rate was 0.01 and is 0.5"):
            engine.finetune(job("lasting", **SETTINGS, learning_rate=0.5), resume=True)
        weights, handle = finish(engine, resume=True)
    assert handle.losses == losses
    assert_same(weights, expected)
    with new_engine(**PINNED, checkpoint_dir=str(tmp_path)) as engine:
        weights, handle = finish(engine, resume=True)
    assert handle.losses == losses, "a job that was done is done at once"
    assert_same(weights, expected)


def test_a_killed_process_resumes_from_its_last_checkpoint(
    new_engine, tmp_path, uninterrupted, tiny_model, compilation_cache
):
    expected, losses = uninterrupted
    settings = dict(
        **dict(model=str(tiny_model), dtype="float32", max_model_len=256, max_rows=4, row_sizes=[4], pages=120),
        **dict(chunk_sizes=[128], microbatch_tokens=256, backward_window=128, max_adapters=12),
        **dict(adapter_rank_capacity=96, compilation_cache=compilation_cache, checkpoint_dir=str(tmp_path)),
        **PINNED,
    )
    settings = {k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()}
    fields = {"name", "data", "rank", "alpha", "learning_rate", "batch_size", "schedule", *SETTINGS}
    values = {name: getattr(job("lasting", **SETTINGS), name) for name in fields}
    kill_after_checkpoint(json.dumps([settings, values]), count=1)
    with new_engine(**PINNED, checkpoint_dir=str(tmp_path)) as engine:
        weights, handle = finish(engine, resume=True)
    assert handle.losses == losses
    assert_same(weights, expected)
    statuses = [event["status"] for event in handle.events() if event["type"] == "status"]
    assert statuses.count("running") == 2, "it was resumed, not begun again"


@pytest.mark.parametrize("paused", [False, True])
def test_a_job_killed_between_its_last_checkpoint_and_its_end_ends(new_engine, tmp_path, paused):
    short = job("lasting", epochs=2)
    with new_engine(**PINNED, checkpoint_dir=str(tmp_path)) as engine:
        handle = engine.finetune(short)
        assert handle.wait(timeout=120) == "succeeded", handle.error
        expected, losses = engine.adapter("lasting").weights, handle.losses
    with new_engine(**PINNED, checkpoint_dir=str(tmp_path)) as engine:
        handle = engine.finetune(short, resume=True, paused=paused)
        if paused:
            assert handle.wait(timeout=0.5) == "paused"
            handle.resume()
        assert handle.wait(timeout=60) == "succeeded", handle.error
        assert handle.losses == losses
        assert_same(engine.adapter("lasting").weights, expected)


def test_a_job_paused_while_its_last_results_are_on_their_way_ends_when_it_is_resumed(new_engine):
    with new_engine(**PINNED) as engine:
        trainer, dispatched = engine.trainer, engine.trainer.dispatched

        def pause_at_the_end(iteration):
            dispatched(iteration)
            if trainer.jobs["lasting"].run.exhausted:
                trainer.pause("lasting")

        trainer.dispatched = pause_at_the_end
        handle = engine.finetune(job("lasting", epochs=2))
        for _ in range(1200):
            if handle.wait(timeout=0.05) == "paused" and len(handle.losses) == handle.total_steps:
                break
        trainer.dispatched = dispatched
        handle.resume()
        assert handle.wait(timeout=60) == "succeeded", handle.error


def kill_after_checkpoint(arguments: str, count: int) -> None:
    """Run the job in a process of its own and kill it without warning once it has reported ``count`` checkpoints."""
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, arguments], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 400
    for line in process.stdout:
        if int(line) >= count or time.monotonic() > deadline:
            break
    process.send_signal(signal.SIGKILL)
    _, errors = process.communicate()
    assert process.returncode == -signal.SIGKILL, errors


def trained_in(new_engine, **settings):
    """The adapter's weights, and how many iterations had forward windows beside backward units."""
    with new_engine(**PINNED, tape=("x",), **settings) as engine:
        handle = engine.finetune(job("lasting", epochs=2, batch_size=16, dropout=0.1))
        assert handle.wait(timeout=120) == "succeeded", handle.error
        shared = sum(bool(record.finetune_slots and record.backward_units) for record in engine.loop.records)
        return engine.adapter("lasting").weights, shared


def test_a_second_tape_changes_nothing_to_the_bit(new_engine):
    """The smaller pool holds one microbatch of 4 blocks at a time, the larger one two."""
    with new_engine(**PINNED, tape=("x",)) as engine:
        columns = engine._runner.programs.dims.pages_per_block
    expected, alone = trained_in(new_engine, pages=6 * columns)
    weights, shared = trained_in(new_engine, pages=12 * columns)
    assert shared > alone
    assert_same(weights, expected)
