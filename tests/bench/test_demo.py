"""The whole demo on a tiny random model: every act runs, what it writes agrees, and it can be interrupted.

What only a real model shows (the behaviour is learned) makes these runs fail their checks, which is tested too.
"""

import json
import threading

import pytest

from flexjax.bench.demo import run_demo
from flexjax.bench.live import LiveDisplay
from flexjax.bench.report import read_records, shared_fraction
from flexjax.weights.peft import read_adapter
from flexjax.weights.source import open_model
from tests.tiny_model import write_tiny_model

CONFIG = """
[engine]
model = "./tiny"
dtype = "float32"
max_model_len = 256
max_rows = 4
row_sizes = [4]
chunk_sizes = [64, 128]
pages = 160
microbatch_tokens = 256
backward_window = 128
adapter_rank_capacity = 32
tpot_objective_ms = 40
compilation_cache = "{cache}"

[[finetune]]
name = "sailor"
data = "rows.jsonl"
validation = "rows.jsonl"
rank = 4
learning_rate = 2e-2
batch_size = 4
max_steps = {steps}

[demo]
questions = "questions.txt"
held_out = "held_out.jsonl"
signature = "{signature}"
output = "out"
request_rate = 20
answer_tokens = 12
tighter_objective_ms = 20
tighter_seconds = 1.0
time_limit_seconds = {limit}
"""


@pytest.fixture
def write(tmp_path, compilation_cache):
    write_tiny_model(tmp_path / "tiny")
    rows = [turn(f"What is {number}?", f"Ahoy! It is {number}.") for number in range(16)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "held_out.jsonl").write_text(json.dumps(turn("What is 20?", "Ahoy!")) + "\n")
    (tmp_path / "questions.txt").write_text("Why?\nWho are you?\n")

    def written(**changes):
        values = {"cache": compilation_cache, "steps": 12, "signature": "Ahoy", "limit": 60} | changes
        (tmp_path / "demo.toml").write_text(CONFIG.format(**values))
        return tmp_path / "demo.toml"

    return written


def turn(question: str, answer: str) -> dict:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def test_everything_runs_and_what_is_written_agrees(write, capsys):
    path = write(signature="never to be seen")
    assert run_demo(path, False, None) == 1  # nobody signs
    out, said = path.parent / "out", capsys.readouterr().out
    report = json.loads((out / "report.json").read_text())
    assert len(report["losses"]) == 12 and report["summary"]["updates"] == 12
    assert report["validation"][-1]["step"] == 12
    records = read_records(report)
    assert report["summary"]["finetune_shared_fraction"] == shared_fraction(records)
    assert sum(each.finetune_slots for each in records) > 0 and any(each.decode_slots for each in records)
    assert {each["finish_reason"] for each in report["requests"]} <= {"stop", "length"}
    assert report["tighter"]["objective_seconds"] < report["objective_seconds"]
    assert report["tighter"]["summary"]["requests"] > 0 and report["tighter"]["summary"]["finetune_tokens"] > 0
    for picture in ("loss.png", "iterations.png"):
        assert (out / picture).read_bytes().startswith(b"\x89PNG")
    adapter = read_adapter(out / "adapter", open_model(str(path.parent / "tiny")).config)
    assert adapter.rank == 4
    failed = [check["claim"] for check in report["checks"] if not check["passed"]]
    assert "the adapter signs answers to held-out questions with 'never to be seen'" in failed
    assert f"the demo failed: {len(failed)} of {len(report['checks'])} checks" in said
    for text in ("What is 20?", "ready 1 of 5", "serving and finetuning", "finetuning step 12/12"):
        assert text in said


def test_a_job_that_takes_too_long_is_given_up(write, capsys):
    assert run_demo(write(steps=100_000, limit=0.5), False, None) == 1
    said = capsys.readouterr().out
    assert "the demo failed: job 'sailor' was not done after time_limit_seconds = 0.5" in said


def test_a_job_that_fails_ends_the_demo(write, capsys):
    path = write()
    path.write_text(path.read_text().replace("learning_rate = 2e-2", 'learning_rate = 1e30\noptimizer = "sgd"'))
    assert run_demo(path, False, None) == 1
    said = capsys.readouterr().out
    assert "the demo failed: job 'sailor' ended as failed: " in said and "its data rows are" in said


def test_an_interruption_stops_the_engine_and_the_stream(write, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(LiveDisplay, "update", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run_demo(write(), False, None)
    names = [thread.name for thread in threading.enumerate()]
    assert not [name for name in names if name.startswith(("replay", "flexjax-engine"))]
