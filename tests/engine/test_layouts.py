"""The catalog of layouts: what every engine starts with, and what each wish adds, against lists written out by hand."""

from dataclasses import replace

import pytest

from flexjax.config import EngineConfig
from flexjax.engine.layouts import LayoutCatalog
from flexjax.layout import SlotLayout

CONFIG = EngineConfig(model="none", max_rows=8, row_sizes=(2, 8), chunk_sizes=(64,), policy="inference_only")


@pytest.fixture
def catalog() -> LayoutCatalog:
    return LayoutCatalog(CONFIG)


ADAPTERS = {SlotLayout(2), SlotLayout(8), SlotLayout(2, 64), SlotLayout(8, 64)}
BASE = {SlotLayout(each.rows, each.chunk, base_only=True) for each in ADAPTERS}
TAPES = {SlotLayout(2, 64, tape=True), SlotLayout(8, 64, tape=True)}


def test_an_engine_starts_with_the_base_model_alone(catalog):
    assert set(catalog.layouts) == BASE


def test_sizes_of_steps_count_rows_too():
    """150 slots leave 2 rows a chunk of 128, and 100 rows one of 64, which is the least."""
    config = replace(CONFIG, max_rows=100, row_sizes=(2, 100), step_sizes=(100, 150))
    mixed = {(each.rows, each.chunk) for each in LayoutCatalog(config).layouts if each.chunk}
    assert mixed == {(2, 64), (2, 128), (100, 64)}


def test_an_engine_that_co_serves_has_tapes_from_the_start():
    """So that they are timed before the first objective has to be kept."""
    assert set(LayoutCatalog(replace(CONFIG, policy="co_serve")).layouts) == BASE | TAPES


def test_adapters_add_every_size_and_jobs_the_tapes(catalog):
    catalog.add_adapters()
    assert set(catalog.layouts) == BASE | ADAPTERS
    catalog.add_jobs()
    assert set(catalog.layouts) == BASE | ADAPTERS | TAPES


def test_a_job_brings_adapters_too(catalog):
    catalog.add_jobs()
    assert set(catalog.layouts) == BASE | ADAPTERS | TAPES


def test_the_largest_counts_tapes_before_there_is_a_job(catalog):
    assert catalog.largest == SlotLayout(8, 64, tape=True)


def test_log_probabilities_come_with_all_rows_and_in_every_mixture(catalog):
    """Whatever is asked for first: a request with them may meet one of an adapter, or a finetuning window."""
    catalog.add_flags(logprobs=True, prompt_logprobs=False)
    with_logprobs = {each for each in catalog.layouts if each.logprobs}
    assert with_logprobs == {
        SlotLayout(8, logprobs=True, base_only=True),
        SlotLayout(8, 64, logprobs=True, base_only=True),
    }
    catalog.add_jobs()
    mixtures = {SlotLayout(8, logprobs=True), SlotLayout(8, 64, logprobs=True)}
    assert mixtures | {SlotLayout(8, 64, logprobs=True, tape=True)} <= set(catalog.layouts)


def test_prompt_log_probabilities_need_a_chunk_and_dropout_a_tape(catalog):
    catalog.add_flags(logprobs=True, prompt_logprobs=True)
    catalog.add_jobs()
    catalog.add_flags(dropout=True)
    assert {each.chunk for each in catalog.layouts if each.prompt_logprobs} == {64}
    assert {each for each in catalog.layouts if each.dropout} == {SlotLayout(8, 64, tape=True, dropout=True)}


def test_asking_twice_adds_nothing(catalog):
    catalog.add_flags(dropout=True)
    before = catalog.layouts
    catalog.add_flags(dropout=True)
    assert catalog.layouts == before


def test_a_pinned_layout_is_there():
    assert SlotLayout(4, 128) in LayoutCatalog(CONFIG, SlotLayout(4, 128)).layouts
