"""The table of docs/clients.md says what the clients saw."""

from flexjax.bench.page import outdated
from scripts.make_clients_docs import PAGE, SUMMARIES, read_results, rows, tables


def test_a_client_is_told_by_its_figures():
    ((title, version, said),) = rows({"guidellm": {"version": "0.8.1", "requests": 24.0, "tokens": 1440.0}})
    assert (title, version) == ("guidellm", "0.8.1")
    assert said.startswith("24 requests, all succeeded; 1,440 tokens")


def test_every_client_has_been_tried():
    assert set(read_results()) == set(SUMMARIES)


def test_the_page_is_up_to_date():
    assert outdated(PAGE, tables(read_results())) == []
