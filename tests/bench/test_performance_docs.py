"""The tables of docs/performance.md say what the results say, and the page is the one they make."""

import pytest

from flexjax.bench.page import outdated
from scripts.make_performance_docs import PAGE, RESULTS, TARGETS, Target, read_results, tables

FACTS = {"device": "NVIDIA H100", "versions": {"jax": "0.11.2"}, "commit": None, "implementations": {"loss": "xla"}}
CASE = {"name": "decode 4 x 8", "shape": "4 rows", "ms": 0.1, "fraction": 0.5, "bound": "copy", "implementation": "xla"}


def row_of(text: str, name: str) -> list[str]:
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {name} |")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def results(metrics, cases=()):
    return FACTS | {"metrics": metrics, "cases": list(cases)}


@pytest.mark.parametrize(
    ("metrics", "reached"),
    [({}, ""), ({"x": 0.9}, "stretch"), ({"x": 0.8}, "yes"), ({"x": 0.7}, "no")],
)
def test_a_target_above(metrics, reached):
    assert Target("x", "", 0.8, 0.9).reached(metrics) == reached


@pytest.mark.parametrize(
    ("metrics", "reached"), [({"x": 10.5}, ""), ({"x": 10.4, "y": 10}, "stretch"), ({"x": 10.9, "y": 10}, "yes")]
)
def test_a_target_below_a_share_of_another(metrics, reached):
    assert Target("x", "", 1.1, 1.05, below=True, share_of="y").reached(metrics) == reached


def test_each_metric_has_one_row_with_its_limits():
    made = tables({"kernels": results({"decode_attention_fraction_of_copy": 0.9, "page_write_2048_rows_us": 30.0})})
    assert row_of(made["metrics"], "`decode_attention_fraction_of_copy`")[1:5] == ["0.9", "≥ 0.88", "≥ 0.93", "yes"]
    assert row_of(made["metrics"], "`page_write_2048_rows_us`")[1:5] == ["30", "≤ 20", "≤ 8", "no"]
    assert row_of(made["metrics"], "`decode_step_lora8_ms_8`")[1:3] == ["", "≤ 1.2 × `decode_step_ms_8`"]
    assert len(made["metrics"].splitlines()) == 2 + len(TARGETS)


def test_a_kernel_stands_beside_its_best_alternative():
    case = CASE | {"alternatives": {"cudnn": 0.3, "xla, gathered": 0.2}}
    made = tables({"kernels": results({}, [case])})["kernel cases"]
    assert row_of(made, "decode 4 x 8") == [
        *("decode 4 x 8", "4 rows", "xla", "100", "0.5 (copy)", "xla, gathered 200", "2")
    ]


def test_the_page_is_up_to_date():
    assert outdated(PAGE, tables(read_results(RESULTS))) == []
