"""``flexjax bench kernels`` from the command line, in miniature; and that its cases describe what they time."""

import json

import jax
import numpy as np
import pytest

from flexjax.bench import kernel_bench, timing
from flexjax.bench.adapter_cases import expand_then_add
from flexjax.bench.attention_cases import causal_pairs, ragged
from flexjax.bench.kernel_bench import deviation
from flexjax.bench.kernel_case import KernelCase, calls_for
from flexjax.bench.kernel_cases import FULL, TINY, all_cases, workload_decode
from flexjax.bench.row_cases import parts_call
from flexjax.cli import main

pytestmark = pytest.mark.skipif(
    jax.default_backend() == "gpu", reason="takes minutes on a GPU: run flexjax bench kernels"
)


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(timing, "SECONDS", 0.001)
    monkeypatch.setattr(timing, "REPEATS", 2)


def run(tmp_path, *only: str) -> tuple[int, dict]:
    out = tmp_path / "kernels.json"
    code = main(["bench", "kernels", "--debug", "--out", str(out), "--only", *only])
    return code, json.loads(out.read_text())


def test_one_case_of_every_operation(tmp_path, capsys):
    picks = ["decode 3 x 130", "chunk 64 of 64", "window_grad 64", "page_write 64 rows in", "lora_grads down_proj"]
    picks += ["lora_expand onto a residual, 64 rows", "page_write keys", "lora_expand gate_up, 64"]
    picks += ["gated_expand, taped", "loss", "product of 2 rows, 64 to 64"]
    code, results = run(tmp_path, *picks)
    assert code == 0
    assert list(results) == ["device", "versions", "commit", "implementations", "metrics", "cases"]
    assert set(results["implementations"].values()) == {"reference"}
    cases = {case["name"]: case for case in results["cases"]}
    assert {"copy", "product", "decode 3 x 130", "decode 3 x 130 ragged", "lora_grads down_proj"} <= set(cases)
    assert all(case["ms"] > 0 and case["fraction"] > 0 for case in cases.values())
    gathered = cases["decode 3 x 130"]
    assert gathered["alternative_ms"] == gathered["alternatives"]["xla, gathered"]
    # Both round weights and outputs to bfloat16, 8 bits: the results agree to a few of its steps.
    assert all(case["deviations"][name] < 0.03 for case in cases.values() for name in case.get("deviations", {}))
    assert list(results["metrics"]) == ["page_write_2048_rows_us"]  # of the others some case or cuDNN is missing
    assert "no GPU: tiny shapes, reference implementations" in capsys.readouterr().out


def test_a_metric_picks_its_cases(tmp_path):
    code, results = run(tmp_path, "decode_attention_few_rows_fraction_of_copy")
    assert code == 0
    assert [case["name"] for case in results["cases"]] == ["copy", "product", "decode 2 x 200"]
    assert list(results["metrics"]) == ["decode_attention_few_rows_fraction_of_copy"]


def test_a_pick_that_names_nothing_is_an_error(tmp_path, capsys):
    assert main(["bench", "kernels", "--out", str(tmp_path / "x"), "--only", "decode", "attention of bees"]) == 2
    assert "'attention of bees' names no case; there are: decode 3 x 130; " in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_a_kernel_that_fails_is_shown_and_the_others_are_written(tmp_path, monkeypatch, capsys):
    def broken(implementation):
        raise RuntimeError("out of registers")

    case = KernelCase("broken", "none", "", 1, 1, 2, prepare=broken, call=None)
    monkeypatch.setattr(kernel_bench, "all_cases", lambda sizes, workloads: [case, *all_cases(sizes, workloads)])
    code, results = run(tmp_path, "broken", "page_write 4")
    assert code == 1
    assert [entry["name"] for entry in results["cases"]] == ["copy", "product", "page_write 4 rows"]
    shown = capsys.readouterr().out
    assert "FAILED broken" in shown and "out of registers" in shown


def test_workloads_give_decode_rows_in_the_middle_of_their_answers(tmp_path):
    for name in ("azure_r20", "sharegpt_r20"):
        (tmp_path / f"{name}.jsonl").write_text('{"t": 0, "p": 100, "o": 20}\n{"t": 1, "p": 7, "o": 3}\n')
    cases = workload_decode(TINY, tmp_path)
    assert [case.name for case in cases] == ["decode 4 rows of azure_r20", "decode 4 rows of sharegpt_r20"]
    _, given = cases[0].prepare("reference")
    contexts = np.asarray(given["positions"] + given["lengths"])
    assert all(100 < context <= 120 or 7 < context <= 10 for context in contexts)


def test_names_are_unique():
    names = [case.name for case in all_cases(FULL, None)]
    assert len(set(names)) == len(names)


def test_work_of_known_cases():
    """By hand, Llama-3.1-8B: a token's K and V are 2 * 8 * 128 values of 2 bytes; 32 heads of 128."""
    cases = {case.name: case for case in all_cases(FULL, None)}
    decode, chunk = cases["decode 64 x 2048"], cases["chunk 2048 of 2048"]
    assert decode.bytes == 64 * 2048 * 4096 + 64 * 32 * (2 * 128 * 2 + 4)
    assert decode.flops == 64 * 2048 * 32 * 128 * 4
    assert chunk.flops == 4 * 32 * 128 * 2048 * 2049 // 2
    assert cases["window_grad 8192 of 8192"].flops == 10 * 32 * 128 * 8192 * 8193 // 2
    assert cases["page_write 2048 rows"].bytes == 2 * 2048 * 4096
    moved = 2 * 2048 * (2 * 14336 + 4096) + 6 * 16 * (14336 + 4096)
    assert cases["lora_grads down_proj, h computed"].bytes == moved
    assert cases["lora_grads down_proj"].bytes == moved + 2 * 2048 * 16
    assert cases["lora_grads of down"].bytes == moved + 2 * 2048 * 16 + 2 * 2048 * 14336
    gated, taped = cases["gated_expand, window of 2048"], cases["gated_expand, taped window of 2048"]
    assert gated.bytes == 2112 * 3 * 28672 + 2 * 2048 * 32 + 2 * 2 * 16 * 14336
    assert taped.bytes == gated.bytes + 2048 * 28672
    onto, alone = (cases[f"lora_expand onto a residual, 2112 slots{of}"] for of in ("", ", no adapter"))
    assert alone.bytes == 3 * 2112 * 8192 and alone.flops == 0
    assert onto.bytes == alone.bytes + 2112 * 16 * 4 + 8 * 16 * 8192
    assert cases["page_write keys and values of llama-3.1-8b, 64 + 2048"].bytes == 2 * 2112 * 4096
    kept = cases["page_write all that is kept of llama-3.1-8b, 64 + 512"]
    assert kept.bytes == 2 * (64 * 4096 + 512 * (4096 + 2 * 8192 + 128 + 57344))
    assert cases["loss 512 tokens"].flops == 4 * 512 * 4096 * 128256


def test_alternatives_compute_the_same():
    """On a GPU they take the kernels; here the references."""
    cases = {case.name: case for case in all_cases(TINY, None)}
    case = cases["lora_expand onto a residual, 64 rows"]
    state, given = case.prepare("reference")
    _, once = case.call("reference")(state, given, 1)
    _, twice = expand_then_add("reference", (TINY.model.hidden,))(state, given, 1)
    np.testing.assert_array_equal(once, twice)
    (case,) = (case for case in cases.values() if case.operation == "write_parts")
    pool, parts = case.prepare("reference")
    once, twice = (parts_call("reference", at_once)(pool, parts, 1)[0] for at_once in (True, False))
    np.testing.assert_array_equal(once, twice)
    assert not np.array_equal(once, pool)


def test_pairs_and_ragged_lengths():
    assert causal_pairs(3, 5) == 3 + 4 + 5
    lengths = ragged(1000, 64)
    assert min(lengths) == 125 and max(lengths) == 1875
    assert sum(lengths) == pytest.approx(64_000, rel=1e-3)


@pytest.mark.parametrize(("bytes", "calls"), [(1, 32), (100, 10), (10_000, 6)])
def test_calls_touch_enough(bytes, calls):
    assert calls_for(bytes, 1000) == calls


def test_deviation_is_relative_to_the_largest():
    assert deviation([np.float32([1, 2])], [np.float32([1, 4])]) == 0.5
