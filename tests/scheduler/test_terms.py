"""Terms: every unit has a price by the names that tables on disks have, and those names alone."""

import json

import pytest

from flexjax.layout import SlotLayout
from flexjax.scheduler.draft import Draft
from flexjax.scheduler.latency import LatencyModel
from flexjax.scheduler.output import Unit, UnitKind
from flexjax.scheduler.terms import PROGRAMS, span_of, unit_term

BACKWARD = Unit(UnitKind.BACKWARD, "j", 1, layer=1, window=0, slots=128, context=192)
LEAN = Unit(UnitKind.BACKWARD, "j", 1, layer=1, window=0, slots=128, context=192, lean=True)


@pytest.mark.parametrize(
    "unit, work",
    [
        (Unit(UnitKind.LOSS, "j", 1, window=0, slots=128), {("loss", 128): 1}),
        (BACKWARD, {("backward", 128): 1, ("span", 128): 192}),
        (LEAN, {("lean_backward", 128): 1, ("lean_span", 128): 192}),
        (Unit(UnitKind.UPDATE, "j", 1), {("update",): 1}),
    ],
    ids=["loss", "backward", "lean backward", "update"],
)
def test_terms_of_a_unit(unit, work):
    assert unit.work == work and unit.program == next(iter(work))
    assert unit.program[0] in PROGRAMS
    assert all(type(term[0]) is str for term in unit.work)  # and no enum, whose repr is another


def test_only_backward_windows_attend():
    positions = {program: span_of((program, 128)) for program in PROGRAMS}
    assert {program: span for program, span in positions.items() if span is not None} == {
        "backward": ("span", 128),
        "lean_backward": ("lean_span", 128),
    }


def test_a_lean_unit_has_prices_of_its_own_that_a_file_keeps(tmp_path):
    """Rich: 1 ms and 2 us a position; lean: 3 ms and 5 us. 192 positions: 1.384 and 3.96 ms."""
    model = LatencyModel()
    for lean, base, slope in ((False, 1e-3, 2e-6), (True, 3e-3, 5e-6)):
        for context in (128, 1024):
            model.calibrate(unit_term(UnitKind.BACKWARD, 128, lean), base + slope * context, context)
    model.save(tmp_path / "table.json")
    names = {kind for (kind, *_), _ in json.loads((tmp_path / "table.json").read_text())["prices"]}
    assert names == {"backward", "span", "lean_backward", "lean_span"}
    for table in (model, LatencyModel.load(tmp_path / "table.json")):
        assert table.work_seconds(BACKWARD.work) == pytest.approx(1.384e-3)
        assert table.work_seconds(LEAN.work) == pytest.approx(3.96e-3)


def test_an_iteration_pays_a_rich_and_a_lean_unit_each_its_own_price():
    """1 ms and 3 ms, in either order."""
    model = LatencyModel()
    model.calibrate(("backward", 128), 1e-3)
    model.calibrate(("lean_backward", 128), 3e-3)
    for units in ((BACKWARD, LEAN), (LEAN, BACKWARD)):
        draft = Draft(0, [SlotLayout(4)], model)
        for unit in units:
            draft.add_unit(unit)
        assert draft.seconds == pytest.approx(4e-3)
