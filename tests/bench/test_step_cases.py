"""Every kind of step case on a tiny model in this process: the figures exist and agree with each other."""

import json
import re
from dataclasses import replace

import pytest

from flexjax.bench.ceilings import Ceilings
from flexjax.bench.step_finetuning import finetune_config
from flexjax.bench.step_group import run_cases
from flexjax.bench.step_plan import RECIPES, StepPlan, tiny_plan
from flexjax.bench.step_setup import StepReport, StepSetup
from flexjax.fields import ConfigError

CHAT_LENGTHS = (60, 33, 17, 200, 90, 64, 65, 12)


@pytest.fixture(scope="module")
def workloads(tmp_path_factory):
    folder = tmp_path_factory.mktemp("workloads")
    (folder / "finetune_chat.txt").write_text("".join(f"{length}\n" for length in CHAT_LENGTHS))
    requests = [{"p": 5 + 7 * number, "o": 3 + number} for number in range(9)]
    (folder / "offline_azure512.jsonl").write_text("".join(json.dumps(each) + "\n" for each in requests))
    return folder


@pytest.fixture
def measure(tmp_path, workloads, compilation_cache):
    """Case names -> (metrics, cases by name)."""
    plan = replace(tiny_plan(), decode_rows=(4,), longest=100, finetune_seconds=0.2)

    def measured(*names: str, workloads=workloads):
        setup = StepSetup(plan, {"compilation_cache": compilation_cache}, workloads, tmp_path)
        report = StepReport(tmp_path / "report.json", Ceilings(copy=1e9, product=1e9), lambda line: None)
        run_cases(setup, tuple(plan.chosen(list(names))), report)
        written = json.loads(report.path.read_text())
        assert written["metrics"] == report.metrics and "2 layers" in written["model"]
        assert written["implementations"].get("paged_attention", "reference") == "reference"
        return report.metrics, {case["name"]: case for case in report.cases}

    return measured


def test_decode(measure):
    metrics, cases = measure("decode")
    assert set(metrics) == {"decode_step_ms_4", "host_gap_fraction"}
    case = cases["decode_4"]
    assert case["ms"] == metrics["decode_step_ms_4"] > 0 and case["device_ms"] > 0 and case["enqueue_ms"] > 0
    assert metrics["host_gap_fraction"] == pytest.approx(max(0, 1 - case["device_ms"] / case["ms"]))
    assert case["fraction"] == pytest.approx(max(case["bytes"], case["flops"]) / 1e9 / (case["ms"] / 1e3))
    # A row of 82 prompt tokens that decodes for the k-th time attends to 82 + k; the 24 iterations that count come
    # after 8 that do not, and rows that began earlier are ahead by at most the 4 chunks that the others took.
    context = float(case["shape"].split()[3].rstrip(","))
    assert "24 iterations" in case["shape"] and 82 + 8 + 12.5 - 1 <= context <= 82 + 8 + 12.5 + 4


def test_decode_with_adapters(measure):
    metrics, _ = measure("decode_lora8")
    assert list(metrics) == ["decode_step_lora8_ms_4"]


def test_prefill(measure):
    metrics, cases = measure("prefill")
    assert metrics["prefill_tokens_per_s"] == pytest.approx(4 * 128 / (cases["prefill"]["ms"] / 1e3))


def test_offline(measure):
    metrics, cases = measure("offline")
    outputs, prompts = sum(range(3, 12)), sum(5 + 7 * number for number in range(9))
    assert metrics["offline_output_tokens_per_s"] == pytest.approx(outputs / (cases["offline"]["ms"] / 1e3))
    assert f"{prompts} prompt and {outputs} output tokens" in cases["offline"]["shape"]


def test_finetuning_of_packed_sequences(measure):
    metrics, cases = measure("finetune_all")
    case = cases["finetune_all"]
    assert set(metrics) == {"finetune_all_tokens_per_s", "finetune_all_activation_mb_per_token"}
    assert set(case["programs_ms"]) >= {"forward", "loss", "update", "microbatch"}
    # each sequence is computed but for its last token; their tiles have 640 slots, of which an optimizer step takes 512
    computed = sum(min(length, 100) - 1 for length in CHAT_LENGTHS)
    epochs, more = divmod(int(re.search(r"(\d+) optimizer steps", case["shape"])[1]) - 1, 2)
    assert 0 < case["useful_tokens"] - epochs * computed < (1 + more) * computed
    assert metrics["finetune_all_activation_mb_per_token"] == pytest.approx(
        sum(case["memory_mb"].values()) / case["microbatch_tokens"]
    )
    # 4 blocks a microbatch at most, each of 2 + 9 pages (rows of 128: x, q, mid 1 each, attention, gate, up 2 each)
    assert case["memory_mb"]["pages"] <= 4 * (2 + 9) * 2 * 64 * 128 * 2 / 1e6


def test_finetuning_of_whole_sequences_of_one_module(measure):
    metrics, cases = measure("finetune_down")
    assert list(metrics) == ["finetune_down_tokens_per_s"]
    assert cases["finetune_down"]["useful_tokens"] % 255 == 0


@pytest.mark.parametrize(
    "name, blocks, names, pages_per_block, shared",
    # a row holds 2048 values: k and v take 1, x, q, attention and mid 2, gate and up 7 each; a final state with its
    # log-sum-exps takes 3 rows, so that 10 of them lie in the 32 layers of a page
    [
        ("finetune_all", 64, 4, 1 + 13, 7),
        ("finetune_all_lean90", 64, 2, 1 + 9, 7),
        ("finetune_all_lean80", 64, 2, 1 + 4, 7),
        ("finetune_down", 128, 6, 1 + 22, 13),
    ],
)
def test_the_pool_of_a_real_run_holds_one_microbatch(tmp_path, name, blocks, names, pages_per_block, shared):
    plan = StepPlan()
    (case,) = plan.chosen([name])
    config = finetune_config(StepSetup(plan, {}, None, tmp_path), case)
    assert config.pages == blocks * pages_per_block + shared
    assert (config.microbatch_tokens, len(config.tape)) == (64 * blocks, names)


def test_every_finetuning_case_has_a_recipe():
    assert [case.name for case in StepPlan().cases if case.kind == "finetune"] == list(RECIPES)


def test_startup(measure):
    metrics, cases = measure("startup")
    assert 0 < metrics["startup_warm_s"] < metrics["startup_cold_s"]
    assert "an empty cache" in cases["startup_cold"]["shape"]


def test_a_missing_workload_is_named(measure):
    with pytest.raises(ConfigError, match="offline_azure512.jsonl.*--workloads"):
        measure("offline", workloads=None)
