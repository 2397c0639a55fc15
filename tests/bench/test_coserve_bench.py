"""``flexjax bench coserve`` on a tiny model: a trace end to end beside a job, the alternatives, both denominators.

Figures mean nothing on a CPU; that they exist, agree with each other and with what was asked for does.
"""

import itertools
import json
import os
import re
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from flexjax.bench.coserve_bench import run_coserve_bench
from flexjax.bench.coserve_capacity import Trial
from flexjax.bench.coserve_denominators import trials_of
from flexjax.bench.coserve_engine import CoserveSetup, Feed, FinetuningRows
from flexjax.bench.coserve_plan import ALTERNATIVES, CHOICES, read_coserve_plan
from flexjax.bench.coserve_progress import Progress
from flexjax.bench.coserve_results import ALONE, CAPACITY, Denominator, ResultFolder, missing_lines, ratios
from flexjax.bench.coserve_trace import Trace, TraceRow, read_trace
from flexjax.bench.replay import ReplayedRequest
from flexjax.cli import main
from flexjax.engine.engine import Engine
from flexjax.engine.runner import Runner
from flexjax.engine.startup import policy_of
from flexjax.fields import ConfigError
from flexjax.scheduler.policies import policy_from_name

CONFIGS = Path(__file__).parents[2] / "configs" / "bench"

ROWS = [{"t": 0.02 + 0.06 * number, "p": 3 + 11 * (number % 7), "o": 1 + 3 * (number % 5)} for number in range(40)]
LENGTHS = (60, 33, 17, 100, 90, 64, 65, 12)

CONFIG = """
[bench]
setup = "tiny"
workload = "even_r17_2s"
lengths = "lengths.txt"
objective_ms = 10000
ttft_objective_ms = 100000
shape = "tiny"
count_from = 0.5
batch_sequences = 2
trained_share = 0.5
adapters = 1
alone_seconds = 0.5
alone_warmup = 0.1
capacity_from = 80.0
capacity_seconds = 1.0
capacity_budget = 1.0
{bench}
[engine]
max_rows = 4
row_sizes = [4]
chunk_sizes = [128]
max_model_len = 256
pages = 64
microbatch_tokens = 256
backward_window = 128
compilation_cache = "{cache}"
{engine}
"""
"""The engine is that of the step benchmark's tests, so that they share what is compiled."""

NAMED = {
    *(f"{name}_ms_{percent}" for name in ("ttft", "tpot", "itl") for percent in ("p50", "p90", "p99")),
    *("max_gap_ms_p99", "attainment", "output_tokens_per_s", "finetune_tokens_per_s", "finetune_loss_tokens_per_s"),
    *("finetune_kept", "efficiency", "preemptions", "prediction_error_p50", "prediction_error_p99", "sm_clock_mhz"),
    *("memory_mb_weights", "memory_mb_requests_most", "memory_mb_finetuning_most", "memory_mb_free_mean"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("coserve")
    (made / "even_r17_2s.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (made / "lengths.txt").write_text("\n".join(map(str, LENGTHS)))
    return made


@pytest.fixture
def config(tmp_path, compilation_cache):
    """Writes the configuration, with further lines of either table."""

    def written(bench: str = "", engine: str = "") -> str:
        path = tmp_path / "coserve.toml"
        path.write_text(CONFIG.format(cache=compilation_cache, bench=bench, engine=engine))
        return str(path)

    return written


def results(folder, name: str) -> dict:
    return json.loads((folder / "results" / f"coserve_tiny_{name}.json").read_text())


def test_a_trace_beside_a_job(folder, config, capsys):
    """First the denominators, which the run then names; a static partition follows from them."""
    out, path = folder / "results", config()
    places = ("--workloads", str(folder), "--out", str(out))
    run = lambda what="run", **changed: run_coserve_bench(path, folder, out, what, **changed)
    assert run("alone") == main(["bench", "coserve", path, "--capacity", *places]) == 0
    assert run() == run(policies=["static_partition"]) == 0
    found, alone, capacity = (
        results(folder, "even_r17_2s_co_serve"),
        results(folder, "alone"),
        results(folder, "even_capacity"),
    )
    metrics = found["metrics"]
    assert set(metrics) >= NAMED and metrics["sm_clock_mhz"] is None  # there is no GPU
    assert {name: metrics[name] for name in ("attainment", "requests", "unfinished")} == {
        **{"attainment": 1.0, "requests": 40, "unfinished": 0},
    }
    for name in ("ttft", "tpot", "itl"):
        assert 0 < metrics[f"{name}_ms_p50"] <= metrics[f"{name}_ms_p90"] <= metrics[f"{name}_ms_p99"]
    check_rates(found)
    check_ratios(found, alone, capacity)
    check_partition(results(folder, "even_r17_2s_static_partition"), alone, capacity)
    assert str(out / "coserve_tiny_even_r17_2s_co_serve.json") in capsys.readouterr().out


def check_rates(found: dict) -> None:
    metrics, line = found["metrics"], found["timeline"]
    assert sum(line["output_tokens"]) == pytest.approx(sum(row["o"] for row in ROWS))
    assert sum(line["arrivals"]) == len(ROWS)
    assert 0 < metrics["output_tokens_per_s"] <= sum(row["o"] for row in ROWS) / (ROWS[-1]["t"] - 0.5)
    # the last half of each sequence has a loss, and a token that is only a target is not computed
    share = metrics["finetune_loss_tokens_per_s"] / metrics["finetune_tokens_per_s"]
    halves, computed = sum(round(0.5 * each) for each in LENGTHS), sum(each - 1 for each in LENGTHS)
    assert share == pytest.approx(halves / computed, abs=0.1)
    assert metrics["memory_mb_requests_most"] > 0
    assert metrics["memory_mb_finetuning_mean"] + metrics["memory_mb_requests_mean"] + metrics[
        "memory_mb_free_mean"
    ] == pytest.approx(metrics["memory_mb_pool"])


def check_ratios(found: dict, alone: dict, capacity: dict) -> None:
    metrics = found["metrics"]
    tokens, rate = alone["metrics"][ALONE], capacity["metrics"][CAPACITY]
    assert metrics["finetune_kept"] == pytest.approx(metrics["finetune_tokens_per_s"] / tokens)
    assert metrics["efficiency"] == pytest.approx(len(ROWS) / ROWS[-1]["t"] / rate + metrics["finetune_kept"])
    assert {name: each["file"] for name, each in found["denominators"].items()} == {
        **{CAPACITY: "coserve_tiny_even_capacity.json", ALONE: "coserve_tiny_alone.json"},
    }
    assert found["denominators"][ALONE]["commit"] == alone["commit"]
    assert capacity["policy"] == "co_serve" and rate == max(each["rate"] for each in capacity["cases"])
    assert metrics["bound_efficiency"] > 0 and not found["notes"]


def check_partition(found: dict, alone: dict, capacity: dict) -> None:
    """One GPU of four serves all: 68 requests a second, of the 80 at least that the only trial held."""
    assert capacity["metrics"][CAPACITY] == 80.0
    assert found["metrics"]["finetune_tokens_per_s"] == pytest.approx(0.75 * alone["metrics"][ALONE])
    assert [case["holds"] for case in found["cases"]] == [True] * 3
    assert found["denominators"][ALONE]["file"] == "coserve_tiny_alone.json"


def test_requests_alone(folder, config, tmp_path):
    """Rates of finetuning do not exist, and without denominators a line says so."""
    path = config()
    assert run_coserve_bench(path, folder, tmp_path, policies=["inference_only"], seconds=1.3, leave_out_every=5) == 0
    name = "coserve_tiny_even_r17_2s_without_every_5th_first1.3s_inference_only.json"
    found = json.loads((tmp_path / name).read_text())
    metrics = found["metrics"]
    assert not {"finetune_tokens_per_s", "finetune_kept", "efficiency", "bound_efficiency"} & set(metrics)
    assert metrics["requests"] == len([row for i, row in enumerate(ROWS) if (i + 1) % 5 and row["t"] <= 1.3])
    assert metrics["attainment"] == 1.0
    assert any("--capacity" in note for note in found["notes"]) and any("--alone" in note for note in found["notes"])
    assert not any("/" in str(value) for value in found["engine"].values())  # no paths of this machine


@pytest.mark.parametrize(
    "changed, missing",
    [({}, set()), ({"objective_ms": 9.0}, {CAPACITY}), ({"rank": 8}, {CAPACITY, ALONE}), ({"longest": 50}, {ALONE})],
)
def test_denominators_of_another_plan_do_not_count(folder, config, tmp_path, changed, missing):
    """Nor do those of another device."""
    plan, _ = read_coserve_plan(config())
    trace, facts = read_trace(folder / "even_r17_2s.jsonl"), {"device": "a chip", "model": "a model", "commit": "abc"}
    measured = ResultFolder(tmp_path, plan, facts)
    measured.write(measured.capacity_file(trace), {CAPACITY: 3.0})
    measured.write(measured.alone_file, {ALONE: 5.0})
    found = ResultFolder(tmp_path, replace(plan, **changed), facts | {"commit": "def"}).denominators(trace)
    assert set(found) == {CAPACITY, ALONE} - missing
    notes = missing_lines(found, "def")
    assert len(notes) == 2 and sum("of commit abc, this run of def" in note for note in notes) == 2 - len(missing)
    assert not ResultFolder(tmp_path, plan, facts | {"device": "another"}).denominators(trace)


def test_a_figure_of_finetuning_alone_is_shared_with_a_set_up_of_the_same_job(folder, config, tmp_path, capsys):
    path, facts = config('alone_setup = "other"'), {"device": "a chip", "model": "a model", "commit": "abc"}
    plan, _ = read_coserve_plan(path)
    other = replace(plan, setup="other", alone_setup=None)
    trace, measured = read_trace(folder / "even_r17_2s.jsonl"), ResultFolder(tmp_path, other, facts)
    measured.write(measured.alone_file, {ALONE: 5.0})
    found = ResultFolder(tmp_path, plan, facts).denominators(trace)
    assert found[ALONE] == Denominator(ALONE, 5.0, "coserve_other_alone.json", "abc")
    assert not ResultFolder(tmp_path, replace(plan, rank=8), facts).denominators(trace)
    assert main(["bench", "coserve", path, "--alone", "--workloads", str(folder), "--out", str(tmp_path)]) == 2
    assert "in set-up 'other' (alone_setup); measure it with that set-up's file" in capsys.readouterr().err
    assert any("--alone and the file of set-up 'other'" in line for line in missing_lines({}, "abc", plan.alone_setup))
    with pytest.raises(ConfigError, match="alone_setup is 'tiny', this set-up itself"):
        replace(plan, alone_setup="tiny")


def test_ratios_need_their_denominators():
    found = {CAPACITY: Denominator(CAPACITY, 40.0, "", None), ALONE: Denominator(ALONE, 1000.0, "", None)}
    bound = {"bound_efficiency": pytest.approx(1.75)}
    assert ratios(10.0, 800.0, 1500.0, found) == {"finetune_kept": 0.8, "efficiency": pytest.approx(1.05), **bound}
    assert ratios(10.0, None, 1500.0, found) == {"efficiency": 0.25, **bound}
    assert ratios(10.0, 800.0, 1500.0, {ALONE: found[ALONE]}) == {"finetune_kept": 0.8}
    assert ratios(10.0, 800.0, 1500.0, {CAPACITY: found[CAPACITY]}) == {}


def test_trials_of_another_policy_or_duration_are_not_gone_on_from():
    cases = [
        {"policy": policy, "seconds": seconds, "rate": rate, "held": rate < 12}
        for policy, seconds, rate in (("inference_only", 40, 10), ("inference_only", 90, 11), ("co_serve", 40, 13))
    ]
    assert trials_of(cases, "inference_only", 40.0) == [Trial(10, True)]
    assert trials_of(cases, "co_serve", 40.0) == [Trial(13, False)]


def test_time_slices_too(folder, config, tmp_path):
    assert run_coserve_bench(config(), folder, tmp_path, policies=["temporal_sharing_64"], seconds=1.0) == 0
    found = json.loads((tmp_path / "coserve_tiny_even_r17_2s_first1s_temporal_sharing_64.json").read_text())
    assert found["engine"]["policy_options"] == {"n": 64} and found["metrics"]["finetune_tokens_per_s"] > 0


def test_several_jobs_share_the_room_by_their_weights(folder, config, tmp_path):
    """Of four requests each adapter is asked by two; the second job is another adapter's, and weighs twice as much."""
    jobs = '[bench.more_jobs.second]\nrank = 8\ntarget_modules = ["down_proj"]\nweight = 2.0'
    assert run_coserve_bench(config(bench=jobs), folder, tmp_path, adapters=2) == 0
    found = json.loads((tmp_path / "coserve_tiny_even_r17_2s_co_serve.json").read_text())
    first, second = (found["metrics"][f"finetune_tokens_per_s_{name}"] for name in ("coserve", "second"))
    assert first + second == pytest.approx(found["metrics"]["finetune_tokens_per_s"])
    assert 1.4 < second / first < 2.8
    assert found["engine"]["max_running_jobs"] == 2 and found["engine"]["max_adapters"] == 4


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("[bench.more_jobs.coserve]", "has a job 'coserve', which is the name of the first"),
        ("[bench.more_jobs.b]\nepochs = 2", r"job 'b' of more_jobs has epochs; it may have \('rank', 'target_modules'"),
    ],
)
def test_jobs_that_cannot_be_are_refused(config, table, message):
    with pytest.raises(ConfigError, match=message):
        read_coserve_plan(config(bench=table))


def test_an_objective_that_nobody_can_hold(folder, config, tmp_path):
    assert run_coserve_bench(config(), folder, tmp_path, policies=["inference_only"], objective_ms=0.001) == 0
    found = json.loads((tmp_path / "coserve_tiny_even_r17_2s_inference_only.json").read_text())
    one_token = sum(row["o"] == 1 for row in ROWS) / len(ROWS)  # these have no time per later token
    assert found["metrics"]["attainment"] == pytest.approx(one_token) and not found["metrics"]["objective_held"]


def test_every_alternative_is_a_policy_of_the_scheduler():
    for name, options in ALTERNATIVES.values():
        assert policy_from_name(name, **options) is not None
    assert {"co_serve", "inference_only", "finetune_only", "dynamic_temporal_sharing", "fixed_budget"} <= set(CHOICES)


def test_tables_win_over_what_a_plan_needs(folder, config, tmp_path):
    plan, engine = read_coserve_plan(config(bench="[bench.engines.finetune_only]\nmax_rows = 2\nrow_sizes = [2]\n"))
    setup = CoserveSetup(plan, engine, tmp_path, plan.trace(folder), plan.sequence_lengths(folder), tmp_path)
    made = setup.engine_config("co_serve")
    assert (made.policy, made.tpot_objective_ms, made.ttft_objective_ms) == ("co_serve", 10000, 100000)
    assert (made.max_adapters, made.adapter_rank_capacity, made.max_rows) == (2, 32, 4)
    assert (made.max_model_len, made.microbatch_tokens) == (256, 256)
    assert setup.engine_config("finetune_only").max_rows == 2
    open_engine = {name: value for name, value in engine.items() if name not in ("max_model_len", "microbatch_tokens")}
    made = replace(setup, engine_table=open_engine).engine_config("co_serve")
    assert (made.max_model_len, made.microbatch_tokens) == (128, 128)  # the longest sequence has 100 tokens


def test_prompts_are_fresh_and_adapters_take_turns(folder):
    """By the place in the file, whatever was left out."""
    trace = read_trace(folder / "even_r17_2s.jsonl").without_every(5)
    submitted = []
    engine = SimpleNamespace(model=SimpleNamespace(vocab_size=7), submit_all=submitted.extend)
    Feed(engine, trace, ("a", "b", "c")).submit([ReplayedRequest(0, row, row.due, float) for row in trace.rows])
    assert [each.adapter for each in submitted] == ["abc"[i % 3] for i in range(len(ROWS)) if (i + 1) % 5]
    assert [len(each.prompt) for each in submitted] == [row.prompt for row in trace.rows]
    assert {token for each in submitted for token in each.prompt} == set(range(7))
    assert len({tuple(each.prompt) for each in submitted if len(each.prompt) > 10}) > 20  # of 26 at this length
    sampling = submitted[3].sampling
    assert (sampling.temperature, sampling.ignore_eos, sampling.max_tokens) == (0.0, True, ROWS[3]["o"])


def test_rows_have_a_loss_at_their_end():
    rows = list(FinetuningRows([4, 10], vocabulary=50, trained_share=0.3))
    assert [row["loss_mask"] for row in rows] == [[False] * 3 + [True], [False] * 7 + [True] * 3]
    assert all(0 <= each < 50 for row in rows for each in row["input_ids"])
    assert next(iter(FinetuningRows([4], 50, 1.0)))["loss_mask"] == [False, True, True, True]


def test_every_job_reads_all_rows_and_they_are_made_meanwhile(folder, config, tmp_path):
    plan, engine = read_coserve_plan(config(bench="[bench.more_jobs.second]\nrank = 8"))
    setup = CoserveSetup(plan, engine, tmp_path, None, plan.sequence_lengths(folder), tmp_path)
    first, second = (list(job.data) for job in setup.jobs(vocabulary=50))
    assert [len(row["input_ids"]) for row in first] == list(LENGTHS)
    assert first == second and first[0] is not second[0]


@pytest.mark.parametrize(
    "bench, engine, message",
    [
        (
            "[bench.engines.co_serve]\nmax_model_len = 64",
            "",
            r"request of \d+ tokens.*max_model_len of \[engine\] is 64",
        ),
        (
            "[bench.engines.co_serve]\nmax_model_len = 90",
            "",
            r"sequence has 100 tokens; max_model_len of \[engine\] is 90",
        ),
        ("", 'policy = "co_serve"', r"\[engine\] has policy.*of \[bench\]"),
        ("", "max_rowz = 3", "max_rowz.*did you mean 'max_rows'"),
        ("batch_tokens = 64", "", "batch_sequences is 2 and batch_tokens is 64"),
        ('target_modules = ["nose"]', "", "nose"),
        ("leave_out_every = 1", "", "leave_out_every is 1"),
        ("workloud = 1", "", "workloud"),
    ],
)
def test_wrong_configurations(folder, config, tmp_path, bench, engine, message):
    with pytest.raises(ConfigError, match=message):
        run_coserve_bench(config(bench, engine), folder, tmp_path)


@pytest.mark.parametrize(
    "words, message",
    [
        ([], "even_r17_2s.jsonl is wanted.*--workloads DIR"),
        (
            ["--workloads", "{folder}", "--workload", "nowhere"],
            "{folder}/nowhere.jsonl does not exist.*--workload NAME",
        ),
        (["--workloads", "{folder}", "--policy", "luck"], "policy is 'luck'; it must be one of .*temporal_sharing_512"),
        (["--workloads", "{folder}", "--count-from", "30"], "counted from 30 s.*2.36 s; lower count_from"),
        (["--workloads", "{folder}", "--policy", "static_partition"], "coserve_tiny_even_capacity.json.*--capacity"),
        (["--alone", "--capacity"], "not allowed with"),
        (["--workload", "one", "two", "--alone"], "--workload names 2 traces"),
        (["--policy", "flat_out", "price", "--capacity"], "--policy names 2 policies; several can only be replayed"),
        (["--policy", "flat_out", "static_partition"], "--policy names 2 policies; several can only be replayed"),
        (["--workloads", "{folder}", "--capacity", "--policy", "finetune_only"], "not 'finetune_only'"),
    ],
)
def test_errors_of_the_command_line(folder, config, tmp_path, capsys, words, message):
    given = [word.format(folder=folder) for word in words]
    assert main(["bench", "coserve", config(), "--out", str(tmp_path), *given]) == 2
    said = capsys.readouterr().err
    assert re.search(message.format(folder=folder), said), said


@pytest.fixture
def engines(monkeypatch) -> list[Engine]:
    """All that are started."""
    made, start = [], Engine.__init__
    monkeypatch.setattr(Engine, "__init__", lambda self, *given: (made.append(self), start(self, *given))[1])
    return made


def test_several_traces_with_one_engine(folder, config, tmp_path, engines):
    """Each as if it were alone: its own requests and job, nothing of the one before; the engine takes the longest."""
    longer = [row | {"p": row["p"] + 60} for row in ROWS[:20]]
    (folder / "longer_r17_1s.jsonl").write_text("".join(json.dumps(row) + "\n" for row in longer))
    names = ["even_r17_2s", "longer_r17_1s"]
    assert run_coserve_bench(config(), folder, tmp_path / "results", traces=names) == 0
    assert len(engines) == 1
    for name, rows in zip(names, (ROWS, longer), strict=True):
        found = results(tmp_path, f"{name}_co_serve")
        metrics, line = found["metrics"], found["timeline"]
        assert found["workload"] == name and found["plan"]["workload"] == name
        assert (metrics["requests"], metrics["attainment"]) == (len(rows), 1.0)
        assert sum(line["output_tokens"]) == pytest.approx(sum(row["o"] for row in rows))
        assert metrics["finetune_tokens_per_s"] > 0


def test_several_policies_with_one_engine(folder, config, tmp_path, engines):
    """Each over every trace, under its own options and in a file of its own; a job beside those that finetune."""
    (folder / "first_r17_1s.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[:20]))
    policies = {"temporal_sharing_64": {"n": 64}, "inference_only": {}, "co_serve": {}}
    places = ("--workloads", str(folder), "--out", str(tmp_path / "results"))
    traces = {"even_r17_2s": 40, "first_r17_1s": 20}
    assert main(["bench", "coserve", config(), *places, "--workload", *traces, "--policy", *policies]) == 0
    assert len(engines) == 1
    for policy, name in itertools.product(policies, traces):
        found = results(tmp_path, f"{name}_{policy}")
        metrics = found["metrics"]
        assert found["policy"] == found["plan"]["policy"] == policy
        assert found["engine"]["policy"] == ALTERNATIVES.get(policy, (policy,))[0]
        assert found["engine"]["policy_options"] == policies[policy]
        assert (metrics["requests"], metrics["attainment"]) == (traces[name], 1.0)
        assert (metrics.get("finetune_tokens_per_s", 0) > 0) == (policy != "inference_only")


def test_a_policy_with_an_engine_of_its_own_is_not_run_with_others(folder, config, tmp_path):
    own = "[bench.engines.inference_only]\nmax_rows = 2"
    with pytest.raises(ConfigError, match="one of its own for inference_only; run it in a command of its own"):
        run_coserve_bench(config(bench=own), folder, tmp_path, policies=["co_serve", "inference_only"])


@pytest.mark.parametrize("sent", [40, 20])
def test_a_run_that_is_told_to_stop(folder, config, tmp_path, monkeypatch, capsys, sent):
    """After all are sent, it ends as if its time were up; before, rates cannot be counted."""
    told = signal.getsignal(signal.SIGTERM)
    longer = [row | {"o": 150} for row in ROWS]
    (folder / "long_r17_2s.jsonl").write_text("".join(json.dumps(row) + "\n" for row in longer))

    def kill(self, elapsed):
        if len(self._replay.requests) >= sent:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Progress, "tell", kill)
    names = ["long_r17_2s", "even_r17_2s"]
    run = lambda: run_coserve_bench(config(), folder, tmp_path / "results", traces=names, policies=["inference_only"])
    if sent < len(ROWS):
        with pytest.raises(ConfigError, match="the last of 40 requests arrives at 2 s.*--seconds"):
            run()
        assert not list(tmp_path.glob("results/*"))
    else:
        assert run() == 0
        found = results(tmp_path, "long_r17_2s_inference_only")
        metrics = found["metrics"]
        assert metrics["requests"] == 40 and metrics["unfinished"] > 0
        assert metrics["attainment"] == pytest.approx(1 - metrics["unfinished"] / 40)
        (note,) = (each for each in found["notes"] if each.startswith("told to stop"))
        assert f"{metrics['unfinished']:.0f} requests that had not been answered" in note
        assert "told to stop: not replayed are even_r17_2s" in capsys.readouterr().out
        assert not (tmp_path / "results" / "coserve_tiny_even_r17_2s_inference_only.json").exists()
    assert signal.getsignal(signal.SIGTERM) is told


def test_a_dead_engine_is_no_row_of_misses(folder, config, tmp_path, monkeypatch):
    """An engine that fails in the middle of a trace ends the run; it does not count as one that serves badly."""
    dispatch, calls = Runner.dispatch_forward, itertools.count()

    def failing(self, *arguments):
        if next(calls) == 60:
            raise ValueError("the device is gone")
        return dispatch(self, *arguments)

    monkeypatch.setattr(Runner, "dispatch_forward", failing)
    with pytest.raises(RuntimeError, match="the device is gone|the engine has stopped"):
        run_coserve_bench(config(), folder, tmp_path, policies=["inference_only"])
    assert next(calls) > 60 and not list(tmp_path.glob("*.json"))


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("coserve_*.toml")), ids=lambda path: path.stem)
def test_set_ups_of_this_repository_are_whole(path, tmp_path):
    """Their engines are possible under every policy, and each opens with its command and what to expect."""
    text = path.read_text()
    assert f"flexjax bench coserve configs/bench/{path.name} --workloads" in text and "# Expected" in text
    plan, engine = read_coserve_plan(str(path))
    assert path.stem == f"coserve_{plan.setup}"
    trace = Trace("x", "x", (TraceRow(0, 1.0, 7000, 1000),))
    longest = {"finetune_long.txt": 8188, "finetune_chat.txt": 3220}[plan.lengths]
    setup = CoserveSetup(plan, engine, path.parent, trace, [100, longest], tmp_path)
    for policy in ("co_serve", "finetune_only", "fixed_budget"):
        config = setup.engine_config(policy)
        assert config.microbatch_tokens >= longest and policy_of(config.resolved(131072, "gpu")) is not None
    assert config.row_sizes[-1] >= 8 and all(size % 8 == 0 for size in config.row_sizes)


def test_runs_are_divided_by_denominators_that_came_later(folder, config, tmp_path, capsys):
    path, facts = config(), {"device": "a chip", "model": "a model", "commit": "abc"}
    plan, _ = read_coserve_plan(path, leave_out_every=5, seconds=1.3)
    trace, out = plan.trace(folder), ResultFolder(tmp_path, plan, facts)
    figures = {"requests_per_s": 10.0, "finetune_tokens_per_s": 800.0, "bound_finetune_tokens_per_s": 1500.0}
    had = {name: vars(Denominator(name, value, "gone.json", "abc")) for name, value in ((ALONE, 7.0), (CAPACITY, 40.0))}
    of_run = {"workload": trace.name, "policy": "co_serve", "denominators": had}
    stale = [
        "no efficiency: because",
        "told to stop: 2 requests that had not been answered count as missed",
        "requests were refused, the first because: it was too long",
    ]
    out.write(out.run_file(trace, "co_serve"), figures | {"finetune_kept": 7.0}, **of_run, notes=stale)
    replace(out, facts=facts | {"commit": "def"}).write(out.alone_file, {ALONE: 1000.0})
    other = {**of_run, "policy": "static_partition"}
    out.write(out.run_file(trace, "static_partition"), {"efficiency": 0.5}, **other, notes=[])
    assert main(["bench", "coserve", path, "--divide", "--workloads", str(folder), "--out", str(tmp_path)]) == 0
    found = json.loads(out.run_file(trace, "co_serve").read_text())
    ratios_now = {"finetune_kept": 0.8, "efficiency": pytest.approx(1.05), "bound_efficiency": pytest.approx(1.75)}
    assert found["metrics"] == figures | ratios_now
    now = vars(Denominator(ALONE, 1000.0, out.alone_file.name, "def"))
    assert found["denominators"] == {ALONE: now, CAPACITY: had[CAPACITY]}
    assert found["notes"] == [f"{ALONE} is of commit def, this run of abc", *stale[1:]]
    assert json.loads(out.run_file(trace, "static_partition").read_text())["metrics"] == {"efficiency": 0.5}
    assert "divided by alone_finetune_tokens_per_s 1,000" in capsys.readouterr().out


@pytest.mark.parametrize(
    "parts, arguments, message",
    [
        (None, [], "has no run of set-up 'tiny'"),
        ({"notes": []}, [], "has no denominators: another version wrote it"),
        ({"notes": [], "denominators": {}}, ["--workload", "one"], "as it is; leave --workload out"),
        ({"notes": [], "denominators": {}}, ["--policy", "flat_out"], "as it is; leave --policy out"),
        (
            {"notes": [], "denominators": {}},
            ["--count-from", "0", "--seconds", "2"],
            "as it is; leave --seconds and --count-from out",
        ),
    ],
)
def test_runs_that_cannot_be_divided_stay_as_they_are(folder, config, tmp_path, capsys, parts, arguments, message):
    path, facts = config(), {"device": "a chip", "model": "a model", "commit": "abc"}
    plan, _ = read_coserve_plan(path)
    out, of_run = ResultFolder(tmp_path, plan, facts), {"workload": "even_r17_2s", "policy": "co_serve"}
    if parts is not None:
        out.write(tmp_path / "coserve_tiny_first_co_serve.json", {}, **of_run, notes=["old"], denominators={})
        out.write(tmp_path / "coserve_tiny_second_co_serve.json", {}, **of_run, **parts)
    before = {file: file.read_text() for file in tmp_path.iterdir()}
    command = ["bench", "coserve", path, "--divide", "--workloads", str(folder), "--out", str(tmp_path), *arguments]
    assert main(command) == 2
    assert message in capsys.readouterr().err
    assert {file: file.read_text() for file in tmp_path.iterdir()} == before
