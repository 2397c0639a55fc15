"""The whole step benchmark: processes, what becomes of those that fail, and results taken in parts."""

import json
import subprocess
import sys

import pytest

from flexjax.bench.step_bench import StepResults, end_session, run_process, run_step_bench
from flexjax.fields import ConfigError

FACTS = {"device": "a chip", "versions": {}, "commit": "abc"}


def report(name: str, value: float, model="a model") -> dict:
    case = {"name": name, "shape": "", "ms": value}
    return {"metrics": {name: value}, "cases": [case], "implementations": {"op": "reference"}, "model": model}


def test_results_grow_with_every_report(tmp_path):
    results = StepResults(tmp_path / "step.json", FACTS)
    results.add(report("one", 1.0))
    results.add({})
    results.add(report("two", 2.0))
    written = json.loads((tmp_path / "step.json").read_text())
    assert written["metrics"] == {"one": 1.0, "two": 2.0}
    assert [case["name"] for case in written["cases"]] == ["one", "two"]
    assert (written["device"], written["model"]) == ("a chip", "a model")
    assert "one" in results.table() and "2" in results.table()


def test_a_benchmark_can_be_taken_in_parts(tmp_path):
    path = tmp_path / "step.json"
    for name, value in (("one", 1.0), ("two", 2.0), ("one", 3.0)):
        StepResults(path, FACTS).add(report(name, value))
    written = json.loads(path.read_text())
    assert written["metrics"] == {"one": 3.0, "two": 2.0}
    assert {case["name"]: case["ms"] for case in written["cases"]} == {"one": 3.0, "two": 2.0}


def test_figures_of_other_commits_stay_and_say_which(tmp_path):
    path = tmp_path / "step.json"
    for commit, name in (("abc", "one"), ("def", "two"), ("ghi", "three")):
        StepResults(path, FACTS | {"commit": commit}).add(report(name, 1.0))
    written = json.loads(path.read_text())
    assert {case["name"]: case["commit"] for case in written["cases"]} == {"one": "abc", "two": "def", "three": "ghi"}
    assert written["commit"] == "ghi" and set(written["metrics"]) == {"one", "two", "three"}


@pytest.mark.parametrize("facts, model", [(FACTS | {"device": "b"}, "a model"), (FACTS, "another")])
def test_figures_of_another_device_or_model_do_not_stay(tmp_path, facts, model):
    path = tmp_path / "step.json"
    StepResults(path, FACTS).add(report("one", 1.0))
    StepResults(path, facts).add(report("two", 2.0, model))
    assert json.loads(path.read_text())["metrics"] == {"two": 2.0}


def test_what_is_no_file_of_results_is_not_overwritten(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("mine")
    with pytest.raises(ConfigError, match="notes.txt.*--out"):
        StepResults(path, FACTS)
    assert path.read_text() == "mine"


def test_a_process_that_takes_too_long_is_ended(tmp_path, capfd):
    assert run_process(tmp_path, {"kind": "probe"}, seconds=0.05) == {}
    assert "ended after" in capfd.readouterr().out


def test_what_a_process_started_ends_with_it():
    code = "import subprocess, sys; print(subprocess.Popen(['sleep', '60']).pid, flush=True); sys.stdin.read()"
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
    )
    with process:
        child = int(process.stdout.readline())
        end_session(process)
        assert process.stdout.read() == b""  # the pipe is closed once the child is gone too
    assert child


def test_one_failure_costs_no_other_figure(tmp_path, compilation_cache, capfd):
    config = tmp_path / "step.toml"
    config.write_text(
        f"""
        [engine]
        compilation_cache = "{compilation_cache}"
        [bench]
        shape = "tiny"
        prefill_prompts = 2
        prefill_length = 64
        prefill_repeats = 1
        [bench.engines.prefill]
        max_rows = 4
        row_sizes = [4]
        chunk_sizes = [128]
        max_model_len = 256
        pages = 64
        max_adapters = 2
        adapter_rank_capacity = 32
        """
    )
    out = tmp_path / "results" / "step.json"
    assert run_step_bench(str(config), None, out, ["offline", "prefill_tokens_per_s"]) == 1
    written = json.loads(out.read_text())
    assert list(written["metrics"]) == ["prefill_tokens_per_s"] and "CPU" in written["device"]
    said = capfd.readouterr().out
    assert "offline_azure512.jsonl" in said and "failed: offline" in said and str(out) in said


def test_a_wrong_choice_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="nonsense"):
        run_step_bench(None, None, tmp_path / "step.json", ["nonsense"])
