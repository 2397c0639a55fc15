import random

import pytest

from flexjax.layout import SlotLayout
from flexjax.scheduler import POLICIES, policy_from_name
from flexjax.scheduler.policy import View

OPTIONS = {
    "co_serve": {"objective": 0.05},
    "price": {"percent": 20},
    "fixed_budget": {"finetune_tokens": 64, "backward_units": 2},
}


def words(count, seed=0):
    rng = random.Random(seed)
    return [rng.randrange(50) for _ in range(count)]


def view(**fields):
    defaults = {"decoding": 1, "prompt_tokens": 0, "waiting": 0, "rows_full": False, "oldest_arrival": None}
    return View(**({"now": 0.0, "arrivals": 0, "finetuning": True} | defaults | fields))


def mixed(simulate, policy, **options):
    """Three requests and a microbatch at once; the iterations until everything that may run has ended."""
    sim = simulate(policy, pages=200, **options)
    sim.microbatch(lengths=(200, 300), layers=8)
    for seed in range(3):
        sim.request(words(100, seed), new=40)
    for _ in range(400):
        sim.step()
    sim.verify()
    return sim


@pytest.mark.parametrize("name", sorted(set(POLICIES) - {"inference_only", "finetune_only"}))
def test_nobody_starves(simulate, name):
    sim = mixed(simulate, name, **OPTIONS.get(name, {}))
    assert len(sim.reasons) == 3 and sim.finished_microbatches == [0]
    assert sim.scheduler.idle


def test_inference_only_and_finetune_only(simulate):
    sim = mixed(simulate, "inference_only")
    assert len(sim.reasons) == 3 and sim.finetuned == 0
    sim = mixed(simulate, "finetune_only")
    assert not sim.reasons and sim.finished_microbatches == [0]


def test_inference_only_takes_tapes_back(simulate):
    sim = simulate("inference_only", pages=20)
    sim.microbatch(lengths=(300,))
    sim.request(words(900), new=20)
    for _ in range(60):
        sim.step()
    sim.verify()
    assert sim.reasons == {0: "length"}


def test_temporal_sharing_takes_turns(simulate):
    sim = mixed(simulate, "temporal_sharing", n=3, stretch=0.01)
    kinds = "".join("s" if iteration.decode or iteration.prompts else "f" for iteration in sim.history)
    assert kinds.startswith("sssfsssfsssfsss")
    assert all(not (i.decode or i.prompts) or not (i.windows or i.units) for i in sim.history)


def test_a_turn_that_waits_for_pages_of_finetuning_goes_to_finetuning(simulate):
    sim = simulate("temporal_sharing", n=50, stretch=0.003, pages=20)
    sim.microbatch(lengths=(300,))
    while not sim.history or not sim.history[-1].units:
        sim.step()
    sim.request(words(1000), new=10)
    sim.drain()
    sim.verify()
    assert len(sim.reasons) == 1 and sim.finished_microbatches == [0]


def test_dynamic_temporal_sharing_serves_more_when_more_is_waiting():
    policy = policy_from_name("dynamic_temporal_sharing", smallest=2, largest=30, stretch=1.0)
    assert policy.turns(view()) == 2
    assert policy.turns(view(waiting=4)) == 10
    assert policy.turns(view(waiting=400)) == 30
    for second in range(100):
        policy.serve(view(now=float(second), arrivals=3 * second))
    assert policy.turns(view()) == 2 * (1 + 3)


def test_a_price_is_kept_on_average_even_if_one_unit_costs_more(simulate):
    sim = simulate("price", percent=10, pages=300)
    sim.request(words(30), new=500)
    while sim.scheduler.statistics.running or not sim.history:
        if sim.scheduler.wants_microbatch("job"):
            sim.microbatch(lengths=(200, 300), layers=8)
        sim.step()
    served = [iteration for iteration in sim.history if iteration.decode]
    alone = sum(sim.latency.predict(iteration.layout, iteration.context_tokens, {}) for iteration in served)
    assert any(iteration.units for iteration in served)
    assert 1.0 < sum(iteration.predicted for iteration in served) / alone < 1.12


def test_fixed_budget_is_fixed_and_knows_no_clock(simulate):
    layout = SlotLayout(8, 256, tape=True)
    plans = []
    for speed in (1.0, 7.0):
        sim = simulate("fixed_budget", finetune_tokens=128, backward_units=3, layout=layout, pages=200)
        sim.cost = lambda iteration, speed=speed: speed * (0.01 + 0.003 * random.Random(iteration.index).random())
        sim.microbatch("a", lengths=(200, 300), layers=8)
        sim.microbatch("b", lengths=(500,), layers=8)
        for seed in range(5):
            sim.request(words(200, seed), new=40)
        sim.drain()
        sim.verify()
        plans.append([(i.layout, i.decode, i.prompts, i.windows, i.units) for i in sim.history])
    assert plans[0] == plans[1]
    assert {plan[0] for plan in plans[0]} <= {layout, None}
    assert max(len(plan[3]) for plan in plans[0]) <= 2
    assert max(len(plan[4]) for plan in plans[0]) == 3


def test_co_serving_yields_to_requests_that_queue_for_rows():
    policy = policy_from_name("co_serve", objective=0.05, margin=0.2, ttft=2.0)
    assert policy.serve(view()).limit == pytest.approx(0.04)
    crowded = {"serving_seconds": 0.01, "waiting": 3, "rows_full": True, "oldest_arrival": 8.5}
    assert policy.finetune(view(now=9.0, **crowded)).units is None
    assert policy.finetune(view(now=9.6, **crowded)).units == 0
    assert policy.finetune(view(now=9.6, **(crowded | {"rows_full": False}))).units is None
    assert policy.finetune(view(now=9.6, **(crowded | {"serving_seconds": 0.0}))).units is None


def test_when_more_come_than_can_be_served_those_already_late_let_others_be_in_time(simulate):
    """Three requests come in each iteration, which has a chunk for one of them."""
    layouts = (SlotLayout(16), SlotLayout(16, 64))
    in_time = []
    for ttft in (100.0, 0.2):
        sim = simulate(objective=0.02, ttft=ttft, rows=16, pages=300, layouts=layouts)
        for wave in range(60):
            for each in range(3):
                sim.request(words(60, 3 * wave + each), new=3)
            sim.step()
        sim.drain()
        sim.verify()
        waits = [sim.first_token_at[request.id] - request.arrival for request in sim.requests.values()]
        in_time.append(sum(wait < 0.2 for wait in waits))
        assert len(waits) == 180
    assert in_time[1] > 1.5 * in_time[0]


def test_each_gap_is_kept_where_the_objective_is_for_single_gaps(simulate):
    gaps = {}
    for name, options in (("mean", {}), ("single", {"itl": 0.02})):
        sim = simulate(objective=0.02, pages=300, **options)
        request, times = sim.request(words(30), new=300), []
        while not sim.reasons:
            if sim.scheduler.wants_microbatch("job"):
                sim.microbatch(lengths=(300, 300), layers=8)
            known, began, iteration = len(sim.outputs[request.id]), sim.now, sim.step()
            if len(sim.outputs[request.id]) > known:
                done = sim.history[-2] if len(sim.history) > 1 and iteration is not None else sim.history[-1]
                units = sum({"loss": 0.001, "backward": 0.0015, "update": 0.002}[str(unit.kind)] for unit in done.units)
                times.append(began + sim.real[-1] - units)
        spans = [after - before for before, after in zip(times[50:], times[51:], strict=False)]
        gaps[name] = sorted(spans)[int(0.99 * len(spans))]
        assert sim.finetuned > 2000
    assert gaps["single"] < 0.0205 < gaps["mean"]


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("fastest", {}, "policy is 'fastest'; it must be one of co_serve, price"),
        ("co_serve", {}, r"'co_serve' takes the options \(objective, margin, ttft, itl\).*objective"),
        ("co_serve", {"objective": 0.1, "slo": 3}, "slo"),
        ("co_serve", {"objective": 0}, "objective is 0"),
        ("co_serve", {"objective": "50ms"}, "objective is '50ms'"),
        ("co_serve", {"objective": 1, "margin": 1.0}, "margin is 1.0"),
        ("co_serve", {"objective": 1, "ttft": -1}, "ttft is -1"),
        ("co_serve", {"objective": 1, "itl": 0}, "itl is 0"),
        ("price", {"percent": -5}, "percent is -5"),
        ("temporal_sharing", {"n": 0}, "n is 0"),
        ("temporal_sharing", {"n": 1.5}, "n is 1.5"),
        ("dynamic_temporal_sharing", {"smallest": 5, "largest": 2}, "largest is 2"),
        ("fixed_budget", {"finetune_tokens": 100, "backward_units": 1}, "finetune_tokens is 100"),
        ("fixed_budget", {"finetune_tokens": 128, "backward_units": 1, "layout": SlotLayout(4, 64)}, "64 slots"),
        ("flat_out", {"units": True}, "units is True"),
    ],
)
def test_bad_options_are_refused_by_name(name, options, message):
    with pytest.raises(ValueError, match=message):
        policy_from_name(name, **options)
