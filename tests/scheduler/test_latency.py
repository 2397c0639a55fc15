import random
from dataclasses import replace

import pytest

from flexjax.layout import SlotLayout
from flexjax.scheduler.latency import LatencyModel
from flexjax.scheduler.output import Iteration, Unit, UnitKind

SMALL, MIDDLE, LARGE = SlotLayout(16), SlotLayout(16, 64), SlotLayout(16, 256, tape=True)


def iteration(model, layout, context=0, backward=0, loss=0):
    units = (Unit(UnitKind.BACKWARD, "j", 0, 1, 0, 512),) * backward + (Unit(UnitKind.LOSS, "j", 0, -1, 0, 512),) * loss
    draft = Iteration(0, layout, (), (), (), units, 0.0, None, context)
    return replace(draft, predicted=model.predict(layout, context, draft.work))


def test_sum_over_programs():
    model = LatencyModel(overhead=0.001)
    model.calibrate(("forward", SMALL), 0.010)
    model.calibrate(("backward", 512), 0.003)
    model.calibrate(("update",), 0.005)
    units = {("backward", 512): 4, ("update",): 1}
    assert model.predict(SMALL, 0, units) == pytest.approx(0.001 + 0.010 + 0.012 + 0.005)
    assert model.predict(None, 0, {}) == pytest.approx(0.001)


def test_slope_is_recovered_from_two_contexts_of_each_layout():
    model = LatencyModel()
    for layout, base, slope in ((SMALL, 0.01, 1e-6), (LARGE, 0.03, 2e-6)):
        for context in (1000, 5000):
            model.calibrate(("forward", layout), base + slope * context, context)
    assert model.predict(SMALL, 10_000, {}) == pytest.approx(0.01 + 0.01)
    assert model.predict(LARGE, 10_000, {}) == pytest.approx(0.03 + 0.02)
    unmeasured = SlotLayout(16, 320)
    assert model.predict(unmeasured, 1000, {}) - model.predict(unmeasured, 0, {}) == pytest.approx(0.002)


def test_rows_and_tiles_have_their_own_price_of_a_position():
    model = LatencyModel()
    for rows, tiles in ((100, 0), (5000, 0), (100, 800)):
        model.calibrate(("forward", LARGE), 0.02 + 3e-8 * rows + 7e-8 * tiles, rows + tiles, tiles)
    assert model.predict(LARGE, 10_000, {}, tile_context=4000) == pytest.approx(0.02 + 3e-8 * 6000 + 7e-8 * 4000)


def test_a_backward_window_far_into_its_sequence_takes_longer():
    model = LatencyModel()
    for context in (512, 32_768):
        model.calibrate(("backward", 512), 0.001 + 2e-8 * context, context)
    far = Unit(UnitKind.BACKWARD, "j", 0, 1, 0, 512, context=60_000)
    assert model.predict(None, 0, far.work) == pytest.approx(0.001 + 2e-8 * 60_000)


def test_prices_of_positions_are_corrected_with_the_rest():
    true = {"base": 0.01, "row": 4e-8, "tile": 9e-8}
    model, rng = LatencyModel(), random.Random(3)
    for rows, tiles in ((0, 0), (90_000, 0), (0, 90_000)):
        seconds = true["base"] + 0.5 * true["row"] * rows + 2 * true["tile"] * tiles
        model.calibrate(("forward", LARGE), seconds, rows + tiles, tiles)
    for _ in range(2000):
        rows, tiles = rng.randrange(200_000), rng.randrange(200_000)
        seconds = (true["base"] + true["row"] * rows + true["tile"] * tiles) * rng.uniform(0.98, 1.02)
        predicted = model.predict(LARGE, rows + tiles, {}, tiles)
        model.observe(Iteration(0, LARGE, (), (), (), (), predicted, None, rows + tiles, tile_context=tiles), seconds)
    assert model.price(("rows", LARGE)) == pytest.approx(true["row"], rel=0.1)
    assert model.price(("tiles", LARGE)) == pytest.approx(true["tile"], rel=0.1)
    assert model.errors().p50 < 0.02


def test_unmeasured_shapes_are_interpolated():
    model = LatencyModel()
    model.calibrate(("forward", SMALL), 0.010)
    model.calibrate(("forward", LARGE), 0.018)
    assert model.predict(MIDDLE, 0, {}) == pytest.approx(0.010 + 0.008 * 64 / 256)
    assert model.predict(SlotLayout(4), 0, {}) == pytest.approx(0.010)
    assert model.predict(SlotLayout(32, 512), 0, {}) == pytest.approx(0.018 * 544 / 272)
    model.calibrate(("backward", 512), 0.004)
    assert model.price(("backward", 256)) == pytest.approx(0.004)
    assert model.price(("backward", 1024)) == pytest.approx(0.008)


def test_an_empty_table_still_predicts_more_for_more():
    model = LatencyModel()
    assert 0 < model.predict(SMALL, 0, {}) < model.predict(LARGE, 0, {}) < model.predict(LARGE, 0, {("update",): 1})


@pytest.mark.parametrize("factor", [0.2, 5.0])
def test_converges_to_a_device_unlike_its_table(factor):
    true = {("forward", SMALL): 0.008, ("forward", LARGE): 0.020, ("backward", 512): 0.0015, ("loss", 512): 0.004}
    model, rng = LatencyModel(), random.Random(1)
    for key, seconds in true.items():
        model.calibrate(key, seconds * factor * rng.uniform(0.7, 1.3))
    for _ in range(1000):
        layout, backward, loss = rng.choice((SMALL, LARGE)), rng.randrange(12), rng.randrange(3)
        seconds = true["forward", layout] + backward * true["backward", 512] + loss * true["loss", 512]
        model.observe(iteration(model, layout, 0, backward, loss), seconds * rng.uniform(0.98, 1.02))
    for key, seconds in true.items():
        assert model.price(key) == pytest.approx(seconds, rel=0.1)
    assert model.errors().p50 < 0.03


def test_one_hiccup_moves_little_and_a_lasting_change_is_followed():
    model = LatencyModel()
    for _ in range(100):
        model.observe(iteration(model, SMALL), 0.010)
    assert model.predict(SMALL, 0, {}) == pytest.approx(0.010, rel=0.01)
    model.observe(iteration(model, SMALL), 1.0)
    assert model.predict(SMALL, 0, {}) < 0.011
    for _ in range(60):
        model.observe(iteration(model, SMALL), 0.020)
    assert model.predict(SMALL, 0, {}) == pytest.approx(0.020, rel=0.05)


def test_an_entry_too_high_to_be_used_comes_back():
    model = LatencyModel()
    model.calibrate(("forward", SMALL), 0.010)
    model.calibrate(("backward", 512), 0.002)
    for _ in range(20):
        model.observe(iteration(model, SMALL, 0, 10), 1.0)
    assert model.price(("backward", 512)) > 0.01
    for _ in range(600):
        model.observe(iteration(model, SMALL), 0.010)
    assert model.price(("backward", 512)) == pytest.approx(0.002, rel=0.1)
    assert model.price(("forward", SMALL)) == pytest.approx(0.010, rel=0.01)


def test_no_entry_turns_negative():
    model = LatencyModel(rate=0.4)
    for key in (("forward", SMALL), ("backward", 512), ("loss", 512)):
        model.calibrate(key, 0.01)
    for _ in range(200):
        model.observe(iteration(model, SMALL, 0, 1, 1), 0.0)
    assert all(price > 0 for (kind, *_), price in model.prices.items() if kind in ("forward", "backward", "loss"))
    assert min(model.prices.values()) >= 0


def test_error_statistics():
    model = LatencyModel(rate=0.0)
    model.calibrate(("forward", SMALL), 0.010)
    assert model.errors().count == 0
    for real in [0.010] * 98 + [0.020] * 2:
        model.observe(iteration(model, SMALL), real)
    errors = model.errors()
    assert (errors.p50, errors.p99, errors.count) == (pytest.approx(0), pytest.approx(0.5), 100)


def test_saved_and_loaded(tmp_path):
    model = LatencyModel(overhead=0.002)
    for context in (0, 1000):
        model.calibrate(("forward", LARGE), 0.03 + 1e-6 * context, context)
    model.calibrate(("update",), 0.004)
    model.save(tmp_path / "table.json")
    loaded = LatencyModel.load(tmp_path / "table.json")
    assert loaded.predict(LARGE, 777, {("update",): 2}) == model.predict(LARGE, 777, {("update",): 2})


TORN = '{"overhead": 0, "rate": 0.1, "prices": [[1]]}'


@pytest.mark.parametrize("content", ["", "{}", "[1, 2]", TORN])
def test_a_torn_table_is_named(tmp_path, content):
    path = tmp_path / "table.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"table\.json is not a latency table"):
        LatencyModel.load(path)


def test_bad_values_are_refused():
    with pytest.raises(ValueError, match="overhead is -1"):
        LatencyModel(overhead=-1)
    with pytest.raises(ValueError, match="rate is 2"):
        LatencyModel(rate=2)
    with pytest.raises(ValueError, match="measured at 0"):
        LatencyModel().calibrate(("update",), 0)
