"""The file of results has the form that others read."""

import json

from flexjax.bench.results import case_result, write_results

FACTS = {"device": "a chip", "versions": {"jax": "1"}, "commit": None}


def test_form_of_the_file(tmp_path):
    path = tmp_path / "deep" / "kernels.json"
    cases = [case_result("copy", "1 GiB", 0.5, bytes=2.0, fraction=1.0, median_ms=float("nan"))]
    written = write_results(path, FACTS, {"page_write": "reference"}, {"page_write_2048_rows_us": 9.5}, cases)
    assert json.loads(path.read_text()) == written
    assert list(written) == ["device", "versions", "commit", "implementations", "metrics", "cases"]
    assert written["cases"] == [
        dict(
            name="copy", shape="1 GiB", ms=0.5, bytes=2.0, flops=None, fraction=1.0, alternative_ms=None, median_ms=None
        )
    ]
    assert [file.name for file in path.parent.iterdir()] == ["kernels.json"]
