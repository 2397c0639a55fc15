"""``flexjax finetune``: to the end, interrupted and resumed, and when a job fails."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from flexjax.cli import main
from flexjax.cli.finetune import without_requests
from flexjax.cli.progress import JobProgress
from flexjax.config import EngineConfig
from tests.cli.conftest import write_config

ROOT = Path(__file__).parents[2]


INTERRUPTIBLE = """
import signal, sys
from flexjax.cli import main

signal.signal(signal.SIGINT, signal.default_int_handler)
sys.exit(main())
"""
"""Ctrl-C reaches this program even where the tests run in the background, whose children ignore it."""


def start(words: list[str], **pipes) -> subprocess.Popen:
    """``flexjax`` in a process of its own, whose programs are those of this process."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "4"}
    return subprocess.Popen([sys.executable, "-c", INTERRUPTIBLE, *words], env=environment, text=True, **pipes)


def test_interrupted_and_resumed_it_ends_with_the_same_adapter(work, adapter, capsys):
    words = ["finetune", str(work / "count.toml"), "--output", str(work / "halves")]
    shown = []
    with start(words, stderr=subprocess.PIPE) as process:
        for line in process.stderr:
            shown.append(line)
            if "step 3/40" in line:
                process.send_signal(signal.SIGINT)
    assert process.returncode == 130
    assert shown[-1].strip() == f"flexjax {' '.join(words)} --resume"
    assert not any("adapter written" in line for line in shown) and not (work / "halves" / "counter").exists()
    capsys.readouterr()
    assert main([*words, "--resume"]) == 0
    lines = capsys.readouterr().err.splitlines()
    steps = [int(line.split("step ")[1].split("/")[0]) for line in lines if "  loss " in line]
    assert steps[0] > 3 and steps == list(range(steps[0], 41))
    assert not (work / "halves" / ".checkpoints").exists()
    whole, halves = (
        load_file(folder / "adapter_model.safetensors") for folder in (adapter, work / "halves" / "counter")
    )
    assert whole.keys() == halves.keys()
    for name in whole:
        np.testing.assert_allclose(halves[name], whole[name], rtol=0, atol=1e-6)


def test_a_job_that_fails_is_told_and_the_others_are_written(work, adapter, compilation_cache, capsys):
    diverging = 'name = "broken"\nlearning_rate = 1e30\nepochs = 4\n'
    config = write_config(work / "two.toml", compilation_cache, diverging, 'name = "quick"\nepochs = 1\n')
    assert main(["finetune", config, "--output", str(work / "two")]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert any(line.startswith("error: job 'broken': ") and "at step" in line for line in lines)
    assert any("quick: step 2/2  loss" in line for line in lines)
    assert (work / "two" / "quick" / "adapter_config.json").is_file() and not (work / "two" / "broken").exists()


def test_bad_rows_are_refused_by_line(work, adapter, compilation_cache, capsys):
    (work / "bad.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n')
    config = Path(write_config(work / "bad.toml", compilation_cache, 'name = "bad"\n'))
    config.write_text(config.read_text().replace("rows.jsonl", "bad.jsonl"))
    assert main(["finetune", str(config)]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and "bad.jsonl, line 2" in error


def test_progress_shows_each_event_once_and_none_from_before():
    progress = JobProgress("counter", total_steps=9, since=100.0)
    old = {"type": "step", "step": 1, "loss": 9.0, "learning_rate": 0.1, "tokens": 10, "time": 50.0}
    events = [old, {"type": "status", "status": "running", "time": 100.0}]
    assert progress.new_lines(events) == ["counter: running"]
    events.append({**old, "step": 2, "loss": 1.25, "tokens": 300, "time": 102.0})
    assert progress.new_lines(events) == ["counter: step 2/9  loss 1.2500  lr 1.00e-01  150 tokens/s"]
    events.append({"type": "evaluation", "step": 2, "loss": 2.0, "time": 103.0})
    events.append({"type": "epoch", "epoch": 1, "step": 2, "time": 103.0})
    events.append({"type": "checkpoint", "path": "a/b", "step": 2, "time": 103.5})
    events.append({"type": "checkpoint_failed", "error": "disk full", "step": 2, "time": 103.6})
    assert [line.removeprefix("counter: ") for line in progress.new_lines(events)] == [
        "step 2/9  validation loss 2.0000",
        "epoch 1 done",
        "step 2/9  checkpoint a/b",
        "step 2/9  no checkpoint: disk full",
    ]
    assert progress.new_lines(events) == []


def test_jobs_alone_get_all_the_time_unless_a_policy_is_named():
    alone = without_requests(EngineConfig(model="m", tpot_objective_ms=40, policy_options={"itl": 0.05}))
    assert (alone.policy, alone.options, alone.tpot_objective_ms) == ("finetune_only", {}, 40)
    named = EngineConfig(model="m", policy="price", policy_options={"percent": 20.0})
    assert without_requests(named) == named
