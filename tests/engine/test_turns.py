"""When the loop begins its iterations: no gap on the device, and no earlier than that takes. In virtual time."""

import random

import pytest

from flexjax.engine.lead import RECENT, WAKE_SECONDS, Lead
from flexjax.engine.loop import LOOK_SECONDS
from tests.engine.virtual_time import World


def served(step, host, predicted: float, seconds: float = 6.0, rows: int = 8, commands=()) -> World:
    """Rows that decode from the beginning to the end."""
    arrivals = [(0.0, lambda world, n=number: world.add_request(n, 6000)) for number in range(rows)]
    end = (seconds, lambda world: [world.loop.cancel_request(number) for number in range(rows)])
    world = World(step, host, [*arrivals, *commands, end])
    world.run(predicted)
    return world


def around(seconds: float, share: float, seed: int):
    draw = random.Random(seed)
    return lambda: seconds * draw.uniform(1 - share, 1 + share)


def idle_share(world: World, after: int) -> float:
    return sum(world.idle[after:]) / (world.ended[-1] - world.ended[after])


@pytest.mark.parametrize("step, host", [(5.1e-3, 2e-3), (5.1e-3, 4e-3), (15e-3, 2e-3), (45e-3, 4e-3)])
def test_the_device_does_not_wait(step, host):
    """Steps that differ by 3 % and a host that needs between half and twice its usual time."""
    draw = random.Random(1)
    world = served(around(step, 0.03, seed=2), lambda: host * draw.choice([0.5, 0.8, 1, 1.2]), predicted=step)
    assert len(world.ended) > 100
    assert idle_share(world, after=20) < 0.005


def test_a_host_that_is_slow_now_and_then_is_expected_to_be():
    """One step in twenty takes the host 8 ms instead of 2."""
    draw = random.Random(3)
    world = served(lambda: 20e-3, lambda: draw.choices([2e-3, 8e-3], [19, 1])[0], predicted=20e-3, seconds=12.0)
    assert idle_share(world, after=150) == pytest.approx(0, abs=1e-12)


def earliness(world: World, after: int) -> list[float]:
    """How long before the end of the one in flight each iteration was begun."""
    return [end - begun for begun, end in zip(world.begun[after + 1 :], world.ended[after:], strict=False)]


def test_an_iteration_begins_no_earlier_than_the_host_needs():
    world = served(lambda: 40e-3, lambda: 2e-3, predicted=40e-3, seconds=12.0)
    early = earliness(world, after=2 * RECENT)
    assert len(early) > 20
    assert max(early) <= 2e-3 + WAKE_SECONDS + 1e-9
    assert max(world.idle) == pytest.approx(0, abs=1e-12)


def test_one_hiccup_moves_nothing():
    """The host once takes 300 ms; later iterations begin as late as before, but for what the prediction moves."""
    pauses = iter([2e-3] * 2 * RECENT + [0.3])
    world = served(lambda: 40e-3, lambda: next(pauses, 2e-3), predicted=40e-3, seconds=14.0)
    early = earliness(world, after=2 * RECENT + 2)
    assert len(early) > 20
    assert max(early) <= 2e-3 + WAKE_SECONDS + 1e-4


@pytest.mark.parametrize("predicted", [1e-3, 15e-3, 100e-3])
def test_a_wrong_prediction_corrects_itself(predicted):
    """The end of an iteration is seen only when the host looks, so a host that looks late could believe what it had
    predicted."""
    world = served(around(5e-3, 0.01, seed=4), around(2e-3, 0.2, seed=5), predicted=predicted, seconds=4.0)
    assert idle_share(world, after=200) < 0.005
    assert world.loop.records[-1].predicted == pytest.approx(5e-3, rel=0.05)


@pytest.mark.parametrize("step, host, predicted", [(5e-3, 2e-3, 1e-3), (5e-3, 2e-3, 60e-3), (2e-3, 8e-3, 2e-3)])
def test_the_end_of_an_iteration_is_noticed(step, host, predicted):
    """While the host waits, at its next look; while it hands the next iteration over, halfway through that."""
    world = served(around(step, 0.2, seed=6), lambda: host, predicted=predicted)
    late = [record.end - ended for record, ended in zip(world.loop.records, world.ended, strict=True)]
    assert max(map(abs, late)) <= max(host / 2, LOOK_SECONDS) + 1e-9


def test_an_iteration_that_ends_long_before_its_time_is_followed_at_once():
    steps = iter([40e-3] * RECENT + [5e-3])
    world = served(lambda: next(steps, 40e-3), lambda: 2e-3, predicted=40e-3)
    assert max(world.idle) <= LOOK_SECONDS + 2e-3 + 1e-9
    assert world.idle[RECENT] > 0


def test_a_host_slower_than_the_device_sets_the_pace():
    world = served(lambda: 5e-3, lambda: 8e-3, predicted=5e-3)
    assert world.ended[-1] - world.ended[-11] == pytest.approx(80e-3, rel=1e-6)
    assert sum(record.seconds for record in world.loop.records) == pytest.approx(world.ended[-1], abs=20e-3)


def test_commands_run_while_the_device_is_busy():
    """Not only when the next iteration is due."""
    times = [1.0 + 0.0137 * number for number in range(20)]
    world = served(lambda: 40e-3, lambda: 2e-3, predicted=40e-3, commands=[(at, lambda _: None) for at in times])
    waits = [ran - at for ran, at in zip(world.obeyed[8:-1], times, strict=True)]
    assert max(waits) <= 2e-3 + WAKE_SECONDS + LOOK_SECONDS


def test_an_arrival_waits_for_the_rest_of_one_iteration():
    """Then for its own prompt step: the first token after at most two steps and what the host needs."""
    times = [1.0 + 0.0531 * number for number in range(30)]
    outputs = []

    class Listener:
        def __init__(self, world):
            self.world = world

        def put(self, output):
            outputs.append((output.finish_reason, self.world.now))

    arrive = lambda world, n: world.add_request(100 + n, 1, Listener(world))
    commands = [(at, lambda world, n=number: arrive(world, n)) for number, at in enumerate(times)]
    served(lambda: 40e-3, lambda: 2e-3, predicted=40e-3, rows=4, commands=commands)
    assert [reason for reason, _ in outputs] == ["length"] * 30
    waits = sorted(at - came for (_, at), came in zip(outputs, times, strict=True))
    assert waits[-1] <= 2 * 40e-3 + 2e-3 + WAKE_SECONDS + LOOK_SECONDS
    assert waits[0] < 40e-3 + 10e-3


def test_the_lead_is_what_all_but_the_worst_needed():
    lead = Lead()
    for seconds in (1, 2, 9, 3):
        lead.began(seconds)
    for seconds in (100, 80, 95, 120, 60, 100, 100, 100):
        lead.ended(seconds, 100)
    assert (lead.host, lead.share) == (3, 0.8)
    assert lead.begin_at(1000, 100) == 1000 + 80 - 3 - WAKE_SECONDS


def test_with_little_known_the_next_iteration_begins_at_once():
    lead = Lead()
    lead.began(1)
    lead.ended(100, 100)
    assert lead.begin_at(1000, 100) < 1000
