"""The search for the capacity against engines of known capacity, and the static partition and the bound by hand."""

import itertools
import math

import pytest

from flexjax.bench.ceilings import Ceilings
from flexjax.bench.coserve_bound import Demand, demand
from flexjax.bench.coserve_capacity import Misses, Trial, highest_held, lowest_failed, next_rate
from flexjax.bench.coserve_metrics import Objective
from flexjax.bench.coserve_partition import best_partition, partitions
from flexjax.bench.coserve_trace import TraceRow
from flexjax.bench.replay import ReplayedRequest
from flexjax.models.config import ModelConfig


def searched(holds, first: float, precision: float) -> list[Trial]:
    trials: list[Trial] = []
    while (rate := next_rate(trials, first, precision)) is not None:
        trials.append(Trial(rate, holds(rate)))
        assert len(trials) < 50
    return trials


@pytest.mark.parametrize("capacity, first", list(itertools.product([0.7, 9.9, 10.0, 31.0, 400.0], [10.0, 25.0])))
def test_the_search_ends_at_the_capacity(capacity, first):
    trials = searched(lambda rate: rate <= capacity, first, 1.05)
    assert capacity / 1.05 <= highest_held(trials) <= capacity < lowest_failed(trials)
    assert len({each.rate for each in trials}) == len(trials) <= 20


@pytest.mark.parametrize("first, rates", [(10.0, [10.0, 10.5]), (10.4, [10.4, 9.905])])
def test_a_search_that_begins_at_the_capacity_ends_after_two_trials(first, rates):
    trials = searched(lambda rate: rate <= 10.2, first, 1.05)
    assert [each.rate for each in trials] == pytest.approx(rates, rel=1e-4)


def test_steps_of_a_search_double_up_to_a_half():
    rates = [each.rate for each in searched(lambda rate: rate <= 100.0, 10.0, 1.05)]
    assert [after / before for before, after in itertools.pairwise(rates[:7])] == pytest.approx(
        [1.05, 1.05**2, 1.05**4, 1.05**8, 1.5, 1.5]
    )


def test_a_search_in_vain_ends():
    assert highest_held(searched(lambda rate: False, 10.0, 1.05)) == 0.0


def test_a_search_goes_on_from_earlier_trials():
    whole = searched(lambda rate: rate <= 17.0, 10.0, 1.1)
    assert next_rate(whole[:3], 10.0, 1.1) == whole[3].rate and next_rate(whole, 10.0, 1.1) is None
    assert next_rate(whole[:3], 900.0, 1.1) == whole[3].rate
    assert next_rate([Trial(10.0, False), Trial(2.0, False)], 900.0, 1.1) == pytest.approx(2.0 / 1.1**2)


def test_a_rate_that_holds_above_one_that_failed_does_not_count():
    trials = [Trial(10.0, True), Trial(20.0, False), Trial(30.0, True)]
    assert (highest_held(trials), lowest_failed(trials)) == (10.0, 20.0)
    assert next_rate(trials, 10.0, 1.05) == pytest.approx(math.sqrt(200))
    assert highest_held([Trial(5.0, False)]) == 0.0 and math.isinf(lowest_failed([]))


def test_a_trial_is_hopeless_with_more_than_one_miss_in_a_hundred():
    misses = Misses(Objective("tpot", 0.045, ttft=2.0), total=200)
    clock = lambda: 10.0
    waits, late, refused = (ReplayedRequest(index, None, 9.0, clock) for index in range(3))
    late.times, refused.error = [11.5], "no"
    overdue = ReplayedRequest(3, None, 8.0, clock)
    assert [misses.missed(each) for each in (waits, late, refused, overdue)] == [False, True, True, True]
    assert not misses.too_many([waits, late, refused]) and misses.too_many([late, refused, overdue])


def test_a_static_partition_by_hand():
    """Six requests a second and GPU on four GPUs, of which each serves 10 when it only serves."""
    found = partitions(rate=6.0, capacity=10.0, alone=1000.0)
    assert [each.rate for each in found] == [8.0, 12.0, 24.0]
    assert [each.holds for each in found] == [True, False, False]
    assert best_partition(6.0, 10.0, 1000.0).finetune_tokens_per_s == 250.0
    assert best_partition(6.0, 10.0, 1000.0).efficiency == pytest.approx(0.6 + 0.25)
    assert best_partition(2.0, 10.0, 1000.0).finetuning == 3
    assert best_partition(8.0, 10.0, 1000.0) is None


def test_what_conservation_leaves_by_hand():
    """Ceilings of 1000 FLOPs and 100 bytes a second; requests take 400 and 30, a finetuning token 6."""
    needed, ceilings = Demand(flops=400.0, bytes=30.0, finetune_flops=6.0), Ceilings(copy=100.0, product=1000.0)
    assert needed.overlapping(ceilings) == pytest.approx(100.0)
    assert needed.taking_turns(ceilings) == pytest.approx((1 - 0.4 - 0.3) * 1000 / 6)
    assert Demand(2000.0, 0.0, 6.0).overlapping(ceilings) == 0.0


def test_demand_by_hand():
    """One layer with 2 heads of 4 and 1 K/V head: q 8 x 8, k and v 8 x 4, o 8 x 8, three of 8 x 10; head 8 x 5."""
    model = ModelConfig(
        **dict(model_type="llama", vocab_size=5, hidden_size=8, intermediate_size=10, num_layers=1, num_heads=2),
        **dict(num_kv_heads=1, head_dim=4, rms_norm_eps=1e-5, rope_theta=1e4, tie_word_embeddings=False),
        **dict(attention_bias=False, max_position_embeddings=64, rope_scaling=None),
    )
    layer, head = 64 + 32 + 32 + 64 + 3 * 80, 40
    found = demand(model, [TraceRow(0, 1.0, 6, 2)], seconds=2.0, lengths=[10, 30], itemsize=2)
    read = 2 * (6 + 1)  # two tokens, each after about seven
    assert found.bytes == pytest.approx(2 * 4 * 2 * read / 2)
    products = 2 * (6 * layer + 2 * (layer + head))
    attention = 4 * 2 * 4 * (6 * 6 / 2 + read)
    assert found.flops == pytest.approx((products + attention) / 2)
    mean_context = (100 + 900) / 2 / 40
    assert found.finetune_flops == pytest.approx(4 * (layer + head) + 3 * 4 * 2 * 4 * mean_context)
