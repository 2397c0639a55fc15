"""The tables of docs/coserving.md say what the results say, and the page is the one they make."""

import pytest

from flexjax.bench.page import outdated
from scripts.make_coserving_docs import NOTHING, PAGE, RESULTS, TARGETS, Target, picture, read_results, share, tables

FACTS = {"device": "NVIDIA H100", "versions": {"jax": "0.11.2"}, "commit": "0123456789abcdef", "setup": "a"}


def run(workload: str, policy: str = "co_serve", setup: str = "a", **metrics) -> dict:
    used = {"alone_finetune_tokens_per_s": {"file": "coserve_a_alone.json"}}
    return FACTS | {"setup": setup, "workload": workload, "policy": policy, "metrics": metrics, "denominators": used}


def rows_of(text: str, *cells: str) -> list[list[str]]:
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    return [row for row in rows if all(cell in row for cell in cells)]


@pytest.mark.parametrize(
    "value, text", [(0.9912, "0.9912"), (1.0, "1"), (0.553, "0.553"), (None, ""), (11500.4, "11,500")]
)
def test_attainment_has_four_digits(value, text):
    assert share(value) == text


def test_targets_are_those_of_co_serving():
    fast, slow = (
        run("sharegpt_r10_240s", finetune_tokens_per_s=12_600.0),
        run("sharegpt_r10_240s", "temporal_sharing_64"),
    )
    tight = run("sharegpt_r10_240s", setup="tight", itl_ms_p99=25.0)
    made = tables({"coserve_a_1": fast, "coserve_a_2": slow, "coserve_tight": tight})["targets"]
    (row,) = rows_of(made, "a", "sharegpt_r10_240s", "`finetune_tokens_per_s`")
    assert row[3:7] == ["12,600", "≥ 10,000", "≥ 12,500", "stretch"]
    (row,) = rows_of(made, "tight", "`itl_ms_p99`")
    assert row[3:7] == ["25", "< 25", "", "no"]
    assert len(made.splitlines()) == 2 + len(TARGETS)


def test_where_a_trace_was_not_replayed_to_its_end_its_longest_beginning_counts():
    name, figure = "sharegpt_r10_240s", dict(itl_ms_p99=24.0)
    short, long = (run(f"{name}_first{each}s", setup="tight", **figure) for each in (60, 140))
    other = run(f"{name}_without_every_5th_first200s", setup="tight", itl_ms_p99=1.0)
    found = {"1": short, "2": long, "3": other}
    (row,) = rows_of(tables(found)["targets"], "tight", "`itl_ms_p99`")
    assert row[1] == f"{name}_first140s" and row[3] == "24"
    whole = run(name, setup="tight", itl_ms_p99=26.0)
    (row,) = rows_of(tables(found | {"4": whole})["targets"], "tight", "`itl_ms_p99`")
    assert row[1] == name and row[6] == "no"


@pytest.mark.parametrize("value, reached", [(None, ""), (0.98, "no"), (0.99, "yes"), (0.999, "stretch")])
def test_a_target_is_reached(value, reached):
    assert Target("a", "x", "attainment", 0.99, 0.999).reached(value) == reached


def test_every_run_has_a_row_and_a_denominator_names_its_users():
    results = {
        "coserve_a_sharegpt_r5_240s_co_serve": run("sharegpt_r5_240s", attainment=0.995, finetune_kept=0.8),
        "coserve_a_alone": FACTS | {"metrics": {"alone_finetune_tokens_per_s": 14_000.0}},
        "coserve_a_sharegpt_capacity": FACTS
        | {"metrics": {"capacity_requests_per_s": 31.5}, "policy": "inference_only"},
    }
    made = tables(results)
    (row,) = rows_of(made["runs"], "sharegpt_r5_240s")
    assert row[2:4] == ["co_serve", "0.9950"] and "0.8" in row
    (alone,) = rows_of(made["denominators"], "`coserve_a_alone.json`")
    assert alone[2:] == ["14,000", "finetune_only", "0123456789", "sharegpt_r5_240s"]
    (capacity,) = rows_of(made["denominators"], "`coserve_a_sharegpt_capacity.json`")
    assert capacity[2:] == ["31.5", "inference_only", "0123456789", ""]


def test_a_run_that_was_stopped_says_so():
    found = run("sharegpt_r5_240s") | {"notes": ["told to stop: 3 requests that had not been answered count as missed"]}
    (row,) = rows_of(tables({"1": found})["runs"], "sharegpt_r5_240s")
    assert row[2] == "co_serve (stopped)"


def test_an_alternative_stands_beside_co_serving_over_the_same_requests():
    mine, theirs = (
        run("sharegpt_r5_240s", finetune_tokens_per_s=12_000.0),
        {"attainment": 1.0, "finetune_tokens_per_s": 8_000.0},
    )
    results = {
        "one": mine,
        "two": run("sharegpt_r5_240s", "dynamic_temporal_sharing", **theirs),
        "three": run("sharegpt_r5_240s_first60s", "temporal_sharing_64", **theirs),  # co_serve was not run on these
        "four": run("sharegpt_r5_240s", "inference_only", attainment=1.0),
    }
    (row,) = rows_of(tables(results)["alternatives"], "a")
    assert row == ["a", "sharegpt_r5_240s", "dynamic_temporal_sharing", "1", "8,000", "12,000", "1.5"]


def test_inference_alone_stands_beside_vllm():
    made = tables({"one": run("azure_r10", "inference_only", tpot_ms_p50=8.84)})["peers"]
    (row,) = rows_of(made, "azure_r10", "`tpot_ms_p50`")
    assert row[2:] == ["8.84", "9.7"]


def test_without_results_the_page_says_so():
    made = tables({})
    assert {made[name] for name in ("device", "runs", "alternatives", "denominators", "memory")} == {NOTHING}
    assert made["figures"] == NOTHING and not any(row[2] for row in rows_of(made["peers"], "azure_r20"))


def test_only_a_case_study_is_drawn():
    study = run("burstgpt", setup="case_study") | {"timeline": {}}
    made = tables({"one": run("sharegpt_r5_240s") | {"timeline": {}}, "two": study})
    assert made["figures"].count("![") == 1 and f"figures/{picture(study)}" in made["figures"]


COUNTED = {"name": "8b, all modules: token-level", "shape": "x, q, k, v, by windows", "gb": 0.771752, "saved": 0.9215}
MEASURED = COUNTED | {"name": "8b, all modules: measured", "memory_mb": {"pages": 687.9}}


def test_memory_that_was_only_counted_has_no_device():
    """Else a machine without a GPU would stand among those that figures were measured on."""
    counted = FACTS | {"device": "x86_64 CPU, 2 cores", "metrics": {}, "cases": [COUNTED]}
    results = {"one": run("x"), "memory": counted}
    made = tables(results)
    assert "CPU" not in made["device"] and made["device"].count("*") == 1
    (row,) = rows_of(made["memory"], COUNTED["name"])
    assert row[1:] == ["x, q, k, v, by windows", "0.772", "92.2 %"]
    assert made["memory"].endswith("\n\nCounted without a GPU (x86_64 CPU, 2 cores; commit 0123456789), not measured.")
    assert tables({"memory": counted})["device"] == NOTHING


def test_memory_that_was_measured_has():
    found = FACTS | {"device": "NVIDIA H200", "metrics": {}, "cases": [COUNTED, MEASURED]}
    made = tables({"memory": found})
    assert made["device"].startswith("* NVIDIA H200; ") and "not measured" not in made["memory"]


def test_the_page_is_up_to_date():
    assert outdated(PAGE, tables(read_results(RESULTS))) == []
