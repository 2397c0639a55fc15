"""Activation memory, counted against sums done by hand and measured on a tiny model."""

import json

import pytest

from flexjax.bench.memory_ablation import ablation
from flexjax.bench.memory_bench import MemoryAsked, metric_of, run_memory_bench
from flexjax.bench.step_model import write_model
from flexjax.bench.step_plan import TINY, TINY_ROWS
from flexjax.finetuning.job import TARGET_MODULES
from flexjax.state import TAPE_NAMES
from flexjax.weights.source import open_model

TOKENS, LAYERS = 1024, 32
LOGITS = 4 * 128256
"""Bytes per token, float32."""


@pytest.fixture(scope="module")
def steps(tmp_path_factory):
    folder = write_model(tmp_path_factory.mktemp("model") / "8b", "llama-3.1-8b", None)
    sizes = {"rank": 16, "window": 512, "head_chunk": 32768}
    return ablation(open_model(str(folder)).config, TARGET_MODULES, TOKENS, "bfloat16", **sizes)


def test_each_step_saves(steps):
    assert [step.name for step in steps] == ["nothing", "pruning", "rematerialization", "token-level"]
    sizes = [step.bytes for step in steps]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 4


def test_pruning_keeps_what_the_adapters_read(steps):
    """x, q, attention and mid of 4,096 values, gate and up of 14,336, k and v of 1,024 each, two bytes a value. The
    log-sum-exp of attention, 128 bytes beside these 94,208, may be counted with it."""
    layer = 2 * (4 * 4096 + 2 * 14336 + 2 * 1024)
    assert steps[1].bytes == pytest.approx(TOKENS * (LAYERS * layer + LOGITS), rel=2e-3)


def test_differentiation_keeps_all_that_and_more(steps):
    """Beside what is pruned at least the two normalized inputs and the product of gate and up."""
    layer = 2 * (6 * 4096 + 3 * 14336 + 2 * 1024)
    assert steps[0].bytes > TOKENS * (LAYERS * layer + LOGITS)


def test_rematerialization_and_windows(steps):
    """x and q are kept and the rest made again: 27 and 2 % of the products of a layer forward and back are gate and up,
    and the output projection. By windows, each kept value lies in pages (a row of 2,048 values in each layer: for 64
    tokens two for x, two for q and one for k and v; the final states of ten times 64 tokens share one), and the loss
    has 512 rows of 32,768 columns at a time."""
    assert steps[2].kept == "x, q, k, v"
    assert steps[2].bytes == TOKENS * (LAYERS * 2 * (2 * 4096 + 2 * 1024) + LOGITS)
    handed_on = 2 * 1024 * 4 + 4096 * 2
    pages = 16 * (2 + 2 + 1) + 2
    assert steps[3].bytes == pages * LAYERS * 64 * 4096 + TOKENS * handed_on + 512 * 32768 * 4 == 771_751_936


def test_the_bench_counts_and_measures(tmp_path, capsys, compilation_cache):
    """The engine is that of the step benchmark's tests, so that they share what is compiled."""
    case, engine = (
        (("tiny", TARGET_MODULES),),
        TINY | TINY_ROWS | {"tape": TAPE_NAMES, "compilation_cache": compilation_cache},
    )
    engine |= {"microbatch_tokens": 256, "backward_window": 128}
    plan = MemoryAsked(case, case, tokens=128, window=64, seconds=0.2, engine=engine, anywhere=True)
    assert run_memory_bench(tmp_path / "memory.json", plan) == 0
    found = json.loads((tmp_path / "memory.json").read_text())
    assert [case["name"].rpartition(": ")[2] for case in found["cases"]][-1] == "measured" and len(found["cases"]) == 5
    measured = found["cases"][-1]
    assert measured["gb"] == pytest.approx(sum(measured["memory_mb"].values()) / 1e3)
    # two blocks of 64 tokens in pages of 64 rows of 128 bytes and 2 layers: at least x, k and v, and the final state
    assert measured["memory_mb"]["pages"] >= 2 * 3 * 64 * 128 * 2 * 2 / 1e6
    assert found["metrics"][f"{metric_of('tiny', TARGET_MODULES, 'nothing')}_saved"] == 0
    assert f"{measured['gb']:.2f} GB" in capsys.readouterr().out
