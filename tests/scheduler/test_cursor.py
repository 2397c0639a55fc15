import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexjax.scheduler.cursor import Microbatch, MicrobatchCursor
from flexjax.scheduler.output import Unit, UnitKind


def make(lengths=(100, 30), **fields):
    defaults = {"id": 1, "job": "j", "window": 128, "layers": 3, "lowest_layer": 1, "pages_per_block": 4}
    return Microbatch(lengths=tuple(lengths), **(defaults | {"closes_group": True} | fields))


def test_axis_of_a_packed_microbatch():
    microbatch = make((100, 30, 64, 1))
    assert (microbatch.blocks, microbatch.slots, microbatch.windows, microbatch.pages) == (5, 320, 3, 20)
    assert [microbatch.block_of(sequence) for sequence in range(4)] == [0, 2, 3, 4]


def test_path_written_out_by_hand():
    cursor = MicrobatchCursor(make())
    assert cursor.peek_units() == ()
    assert [(p.sequence, p.start, p.length, p.block) for p in cursor.take_forward(1)] == [(0, 0, 64, 0)]
    assert [(p.sequence, p.start, p.length, p.block) for p in cursor.take_forward(9)] == [(0, 64, 36, 1), (1, 0, 30, 2)]
    assert cursor.take_units(99) == (
        Unit(UnitKind.LOSS, "j", 1, -1, 0, 128),
        Unit(UnitKind.LOSS, "j", 1, -1, 1, 128),
        Unit(UnitKind.BACKWARD, "j", 1, 2, 1, 128, context=64),
        Unit(UnitKind.BACKWARD, "j", 1, 2, 0, 128, context=64 + 128),
        Unit(UnitKind.BACKWARD, "j", 1, 1, 1, 128, context=64),
        Unit(UnitKind.BACKWARD, "j", 1, 1, 0, 128, context=64 + 128),
        Unit(UnitKind.UPDATE, "j", 1),
    )
    assert cursor.done


def test_restart_only_before_the_backward_pass():
    cursor = MicrobatchCursor(make())
    cursor.take_forward(9)
    cursor.take_units(2)
    assert cursor.begun and not cursor.backward_begun
    cursor.restart()
    assert cursor.tiles_left == 3
    cursor.take_forward(9)
    cursor.take_units(3)
    with pytest.raises(ValueError, match="cannot be restarted"):
        cursor.restart()


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"lengths": ()}, "lengths"),
        ({"lengths": (3, 0)}, "lengths"),
        ({"window": 100}, "window is 100"),
        ({"lowest_layer": 3}, "lowest_layer is 3"),
        ({"pages_per_block": 0}, "pages_per_block is 0"),
    ],
)
def test_bad_microbatches_are_refused_by_name(fields, message):
    with pytest.raises(ValueError, match=message):
        make(**fields)


@settings(max_examples=100, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 300), min_size=1, max_size=5),
    window=st.sampled_from((64, 128, 512)),
    layers=st.integers(1, 3),
    closes_group=st.booleans(),
    evaluation=st.booleans(),
    steps=st.lists(st.integers(1, 4), min_size=1, max_size=8),
)
def test_every_token_once_and_every_unit_after_what_it_needs(
    lengths, window, layers, closes_group, evaluation, steps, reference_units
):
    fields = {"window": window, "layers": layers, "lowest_layer": 0, "closes_group": closes_group}
    microbatch = make(lengths, evaluation=evaluation, **fields)
    cursor = MicrobatchCursor(microbatch)
    tokens, units, turn = [], [], 0
    while not cursor.done:
        step = steps[turn % len(steps)]
        turn += 1
        pieces = cursor.peek_forward(step)
        assert pieces == cursor.take_forward(step)
        assert sum(-(-piece.length // 64) for piece in pieces) <= step
        for piece in pieces:
            assert piece.start % 64 == 0
            assert piece.block == microbatch.block_of(piece.sequence) + piece.start // 64
            tokens += [(piece.sequence, piece.start + at) for at in range(piece.length)]
        taken = cursor.take_units(step)
        assert not taken or cursor.tiles_left == 0
        units += [(str(unit.kind), unit.layer, unit.window) for unit in taken]
    assert tokens == [(sequence, at) for sequence, length in enumerate(lengths) for at in range(length)]
    assert units == reference_units(microbatch)
