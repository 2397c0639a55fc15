"""Packed batches against arrays written out by hand."""

from types import SimpleNamespace

import numpy as np
import pytest

from flexjax.engine.adapters import BASE, AdapterTable
from flexjax.engine.batch import Serving, Training, backward_batch, forward_batch, loss_batch, sampling_batch
from flexjax.finetuning.packing import pack_group
from flexjax.layout import SlotLayout
from flexjax.request import Request, SamplingLevel, SamplingParams
from flexjax.scheduler.output import DecodeSlot, Iteration, MicrobatchPages, PromptSegment, WindowSegment
from flexjax.state import Dimensions
from flexjax.step_batch import backward_fields, forward_fields, loss_fields, sampling_fields, unpack
from tests.ladder import LLAMA, example

LAYOUT = SlotLayout(3, 320, tape=True, dropout=True, prompt_logprobs=True)
SAMPLING = SamplingParams(
    **dict(temperature=0.5, top_p=0.9, top_k=7, min_p=0.1, presence_penalty=0.2, frequency_penalty=0.3),
    **dict(repetition_penalty=1.5, min_tokens=2),
)


@pytest.fixture(scope="module")
def dims() -> Dimensions:
    """A tape of two columns; four pages to a sequence; windows of two blocks on an axis of six."""
    sizes = dict(max_rows=4, context=256, pages=99, rank_capacity=32, adapters=3, microbatch=384, window=128)
    return Dimensions(LLAMA, np.float32, **sizes, tape=("x",))


@pytest.fixture(scope="module")
def table() -> AdapterTable:
    table = AdapterTable(adapters=3, rank_capacity=32)
    version = table.new("x", 12, 0.5)
    assert table.try_seat(version)
    table.announce(version)
    return table


@pytest.fixture(scope="module")
def training(table) -> Training:
    """Sequences of 130 and 70 computed tokens: blocks 0 to 2 and 3 to 4. Block n has pages 10 n, 10 n + 1 and 10 n + 2;
    three final hidden states share page 7, two page 9."""
    group = [example(np.arange(131) + 100), example(np.arange(71) + 500, np.arange(71) > 60)]
    (packed,) = pack_group(group, 384, 0, 0)
    pages = tuple(tuple(10 * block + column for column in range(3)) for block in range(5))
    return Training(packed, MicrobatchPages(pages, (7, 9), 3), table.find("x"), dropout=0.25, seed=3)


def serving(number: int, prompt, adapter=BASE, sampling=SAMPLING, output=()) -> Serving:
    request = Request(number, tuple(prompt), sampling, max_new_tokens=9, stop_token_ids=frozenset({5, 2}))
    return Serving(request, adapter, seed=77 + number, tokens=[*prompt, *output])


@pytest.fixture(scope="module")
def batch(dims, table, training):
    """Row 0 decodes; row 2 computes the second tile of its prompt of 101; a finetuning window of 66 tokens follows."""
    requests = {
        7: serving(7, range(70), output=[1, 2]),
        8: serving(8, range(200, 301), table.find("x"), SamplingParams(temperature=0.0)),
    }
    iteration = Iteration(
        **dict(index=0, layout=LAYOUT, units=(), predicted=0.0, limit=None, context_tokens=0),
        decode=(DecodeSlot(row=0, request_id=7, position=71, pages=(50, 51)),),
        prompts=(PromptSegment(8, row=2, slot=64, start=64, length=37, pages=(60, 61), samples=True),),
        windows=(WindowSegment("job", 1, sequence=0, slot=128, start=64, length=66, block=1),),
    )
    forward = unpack(forward_batch(dims, iteration, requests, {1: training}, table), forward_fields(dims, LAYOUT))
    sampling = sampling_batch(iteration, requests)
    assert sampling.level is SamplingLevel.PENALISED  # request 7 holds stop ids back
    return SimpleNamespace(**vars(forward), **vars(unpack(sampling.packed, sampling_fields(LAYOUT.rows))))


def test_adapters(batch):
    assert batch.owner.tolist() == [[1, 1, 0, 0]] * 4
    assert batch.scale.tolist() == [0.0, 0.5, 0.0]


def test_an_adapter_owns_nothing_in_products_that_it_does_not_change():
    table = AdapterTable(adapters=4, rank_capacity=32)
    for name, products in (("attention", (0, 1)), ("down", (3,)), ("not published", None)):
        version = table.new(name, 8, 1.0)
        version.products = products
        assert table.try_seat(version)
        table.announce(version)
    owner, scale = np.full((4, 4), 9, np.int32), np.zeros(4, np.float32)
    table.fill(owner, scale)
    qkv, o, gate_up, down = owner.tolist()
    assert qkv == o == [1, 0, 3, 0]
    assert gate_up == [0, 0, 3, 0]
    assert down == [0, 2, 3, 0]


def test_decode_rows(batch):
    assert batch.row_position.tolist() == [71, -1, -1]
    assert batch.row_pages[0].tolist() == [50, 51, 0, 0]
    assert batch.row_adapter.tolist() == [0, 0, 0]


def test_prompt_segment(batch):
    assert batch.tokens[64:101].tolist() == list(range(264, 301))
    assert batch.targets[64:101].tolist() == [*range(265, 301), 0]  # nothing follows the last token
    assert (batch.tile_position[1], batch.tile_length[1]) == (64, 37)
    assert batch.tile_pages[1].tolist() == [60, 61, 0, 0]
    assert (batch.tile_adapter[1], batch.tile_row[1]) == (1, 2)


def test_window_segment(batch):
    """Tiles 2 and 3 are blocks 1 and 2 of the microbatch; their sequence began in block 0."""
    assert batch.tokens[128:194].tolist() == list(range(164, 230))
    assert batch.tile_position.tolist() == [0, 64, 64, 128, 0]
    assert batch.tile_length.tolist() == [0, 37, 64, 2, 0]
    assert batch.tile_pages[2].tolist() == [0, 10, 0, 0]
    assert batch.tile_pages[3].tolist() == [0, 10, 20, 0]
    assert batch.tile_row.tolist() == [-1, 2, -1, -1, -1]
    assert batch.final_place.tolist() == [-1, -1, 22, 23, -1]
    assert batch.tape_pages.tolist() == [[-1, -1], [-1, -1], [11, 12], [21, 22], [-1, -1]]


def test_dropout_of_requests_is_none_and_seeds_follow_the_block(batch, training):
    np.testing.assert_array_equal(batch.dropout_rate, np.float32([0, 0, 0.25, 0.25, 0]))
    seeds = [training.tile_seed(block) for block in range(5)]
    assert batch.dropout_seed.tolist() == [0, 0, seeds[1], seeds[2], 0]
    assert [seed - seeds[0] for seed in seeds] == [0, 64, 128, 192, 256]  # each token its own


def test_sampling(batch):
    """Row 0 samples position 72, its third output token; row 2 position 101, its first."""
    assert batch.sample_slot.tolist() == [0, -1, 3 + 64 + 36]
    assert batch.sampled.tolist() == [1, 0, 1]
    assert batch.position.tolist() == [72, 0, 101]
    assert batch.prompt_length.tolist() == [70, 0, 101]
    expected = dict(temperature=0.5, top_p=0.9, top_k=7, min_p=0.1, presence=0.2, frequency=0.3, repetition=1.5)
    assert batch.seed.tolist() == [84, 0, 85]
    for name, value in expected.items():
        assert getattr(batch, name)[0] == pytest.approx(value), name
        idle = {"top_p": 1, "repetition": 1}.get(name, 0)
        assert getattr(batch, name)[1] == idle, name
    assert batch.temperature[2] == 0


@pytest.mark.parametrize("output, banned", [((), True), ((1,), True), ((1, 2), False)])
def test_stop_ids_are_held_back_until_enough_tokens(output, banned):
    """min_tokens is 2: the first and the second output token must not be a stop id, the third may."""
    position = 70 + len(output) - 1
    layout = SlotLayout(1)
    slots = dict(decode=(DecodeSlot(0, 7, position, (50, 51)),), prompts=(), windows=())
    rest = dict(index=0, layout=layout, units=(), predicted=0.0, limit=None, context_tokens=0)
    request = {7: serving(7, range(70), output=output)}
    packed = sampling_batch(Iteration(**slots, **rest), request).packed
    held_back = unpack(packed, sampling_fields(1)).banned[0]
    assert [int(token) for token in held_back if token >= 0] == ([2, 5] if banned else [])


def test_loss_windows(dims, training):
    """Targets follow their slots: 130 of the first sequence, of the second those of its last ten tokens."""
    windows = [unpack(loss_batch(dims, training, window), loss_fields(dims)) for window in range(3)]
    assert [int(window.start) for window in windows] == [0, 128, 256]
    assert [window.final_place.tolist() for window in windows] == [[21, 22], [23, 27], [28, -1]]
    targets = np.concatenate([window.targets for window in windows])
    expected = np.full(384, -1)
    expected[:130] = np.arange(130) + 101
    expected[192 + 60 : 192 + 70] = 500 + np.arange(61, 71)
    np.testing.assert_array_equal(targets, expected)
    assert windows[0].normaliser == pytest.approx(1 / 140)


def test_backward_windows(dims, training):
    units = [unpack(backward_batch(dims, training, 1, window), backward_fields(dims)) for window in range(3)]
    for window, unit in enumerate(units):
        assert (unit.layer, unit.start) == (1, 128 * window)
        assert unit.kv_page.tolist() == [0, 10, 20, 30, 40, 0]
        assert unit.block_start.tolist() == [0, 0, 0, 3, 3, 5]  # the last block is padding
        assert unit.scale == 0.5
    assert [unit.tile_position.tolist() for unit in units] == [[0, 64], [128, 0], [64, 0]]
    assert [unit.tape_pages.tolist() for unit in units[1:]] == [[[21, 22], [31, 32]], [[41, 42], [-1, -1]]]
    assert [unit.final_place.tolist() for unit in units] == [[21, 22], [23, 27], [28, -1]]
    seeds = [training.tile_seed(block) for block in range(5)]
    assert [unit.dropout_seed.tolist() for unit in units] == [seeds[:2], seeds[2:4], [seeds[4], 0]]
    assert units[2].dropout_rate.tolist() == [0.25, 0]
