"""The table of docs/reliability.md says what the fault tests wrote down."""

from flexjax.bench.page import outdated
from scripts.make_reliability_docs import PAGE, read_results, rows, tables

KILLS = [
    {"moments": 2, "files": 3, "events": 700, "checkpoints": 4, "adapter_changes": 6, "answered": 50, "cut": 1},
    {"moments": 2, "files": 2, "events": 800, "checkpoints": 0, "adapter_changes": 1, "answered": 10, "cut": 3},
]


def test_tries_are_added_up():
    ((title, tries, said),) = rows({"kill": KILLS})
    assert title.startswith("SIGKILL") and tries == "4"
    assert "5 files, 1,500 events, 4 checkpoints, 7 adapter changes were acknowledged" in said
    assert "60 requests were answered" in said and "4 cut off" in said


def test_logs_that_were_refused_are_told_apart():
    ((_, tries, said),) = rows({"torn log": [{"transactions": 7}, {"transactions": 40}, {"transactions": -1}]})
    assert tries == "3" and said.startswith("2 were opened, with the first 7 to 40 of 40")
    assert said.endswith("1 were refused")


def test_the_page_is_up_to_date():
    assert outdated(PAGE, tables(read_results())) == []
