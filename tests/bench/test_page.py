"""Pages that are made from results: what is written goes into its place, and nowhere else."""

import pytest

from flexjax.bench.page import fill, filled, number, outdated

PLACE = "<!-- begin {0} -->\n{1}\n<!-- end {0} -->\n"
PAGE = f"a\n{PLACE.format('metrics', 'old')}b\n{PLACE.format('step cases', 'kept')}c"


@pytest.mark.parametrize(
    ("value", "text"), [(0.8826, "0.883"), (12.44, "12.4"), (41230.2, "41,230"), (None, ""), (0.0012345, "0.00123")]
)
def test_numbers_have_three_digits(value, text):
    assert number(value) == text


def test_prose_stays_and_only_what_was_measured_is_replaced():
    assert filled(PAGE, {"metrics": "new"}) == PAGE.replace("old", "new")
    assert filled(filled(PAGE, {"metrics": "new"}), {"metrics": "new"}) == PAGE.replace("old", "new")


def test_a_page_without_a_place_is_an_error(tmp_path):
    (tmp_path / "page.md").write_text("nothing", encoding="utf-8")
    for look in (fill, outdated):
        with pytest.raises(ValueError, match="begin metrics"):
            look(tmp_path / "page.md", {"metrics": ""})
    assert (tmp_path / "page.md").read_text(encoding="utf-8") == "nothing"


def test_a_page_is_out_of_date_until_it_is_filled(tmp_path):
    path, made = tmp_path / "page.md", {"metrics": "≥ 3 µs", "step cases": "kept"}
    path.write_text(PAGE, encoding="utf-8")
    assert outdated(path, made) == ["metrics"]
    fill(path, made)
    assert outdated(path, made) == [] and path.read_text(encoding="utf-8") == PAGE.replace("old", "≥ 3 µs")
