"""The whole engine in its other forms: sharded over devices, in bfloat16, on random weights, under each policy."""

import jax.numpy as jnp
import numpy as np
import pytest

from flexjax.layout import SlotLayout
from flexjax.request import SamplingParams
from flexjax.scheduler import POLICIES
from tests.engine.conftest import job

PROMPTS = [list(b"hello there"), list(range(70, 170)), [7]]
GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)


def answers(engine, adapter=None) -> list[list[int]]:
    return [output.token_ids for output in engine.generate(PROMPTS, GREEDY, adapter)]


@pytest.fixture(scope="module")
def unsharded(new_engine):
    with new_engine() as engine:
        base = answers(engine)
        handle = engine.finetune(job("trained"))
        assert handle.wait(timeout=120) == "succeeded", handle.error
        return base, answers(engine, "trained"), handle.losses, engine.adapter("trained").weights


@pytest.mark.parametrize("tp", [2, 4])
def test_shards_serve_and_train_as_one_device(new_engine, unsharded, tp):
    base, adapted, losses, weights = unsharded
    with new_engine(tp=tp) as engine:
        assert answers(engine) == base
        handle = engine.finetune(job("trained"))
        assert handle.wait(timeout=120) == "succeeded", handle.error
        assert handle.losses == [pytest.approx(loss, rel=1e-4) for loss in losses]
        assert answers(engine, "trained") == adapted
        for name, (a, b) in engine.adapter("trained").weights.items():
            np.testing.assert_allclose(a @ b, weights[name][0] @ weights[name][1], atol=2e-3)


def test_head_counts_that_do_not_divide_are_refused_by_name(new_engine):
    with pytest.raises(ValueError, match="num_.*heads|tp"):
        new_engine(tp=3)


def test_bfloat16_serves_and_trains(new_engine, unsharded):
    _, _, losses, _ = unsharded
    with new_engine(dtype="bfloat16") as engine:
        assert engine._runner.pool.dtype == jnp.bfloat16
        handle = engine.finetune(job("trained"))
        assert handle.wait(timeout=120) == "succeeded", handle.error
        # eight bits of mantissa in every product of three layers
        assert handle.losses[0] == pytest.approx(losses[0], rel=0.02)
        assert handle.losses[-1] < handle.losses[0]
        assert {a.dtype for a, _ in engine.adapter("trained").weights.values()} == {np.dtype(np.float32)}
        assert all(len(tokens) == 12 for tokens in answers(engine, "trained"))


def test_random_weights_need_no_files_but_a_configuration(new_engine, tiny_model, tmp_path):
    (tmp_path / "config.json").write_bytes((tiny_model / "config.json").read_bytes())
    with new_engine(model=str(tmp_path), load_format="dummy") as engine:
        assert len(answers(engine)[0]) == 12
        with pytest.raises(ValueError, match="has no tokenizer.json; give token ids"):
            engine.generate(["text"], GREEDY)
        rows = [{"input_ids": [1, 2, 3, 4], "loss_mask": [0, 0, 1, 1]}] * 8
        assert engine.finetune(job("ids", data=rows)).wait(timeout=120) == "succeeded"


OPTIONS = {
    "co_serve": dict(tpot_objective_ms=50.0),
    "price": dict(policy_options={"percent": 50}),
    "temporal_sharing": dict(policy_options={"n": 4}),
    "fixed_budget": dict(policy_options={"finetune_tokens": 64, "backward_units": 2}),
}


@pytest.mark.parametrize("policy", [name for name in POLICIES if name not in ("inference_only", "finetune_only")])
def test_every_policy_that_does_both_answers_and_finishes(new_engine, unsharded, policy):
    base, _, losses, _ = unsharded
    with new_engine(policy=policy, **OPTIONS.get(policy, {})) as engine:
        handle = engine.finetune(job("trained"))
        assert answers(engine) == base
        assert handle.wait(timeout=120) == "succeeded", handle.error
        assert handle.losses == [pytest.approx(loss, rel=1e-4) for loss in losses]


def test_another_policy_from_the_next_iteration_on(new_engine, unsharded):
    """A job that waits for ever goes on under one that finetunes; answers do not change."""
    base, _, losses, _ = unsharded
    with new_engine(policy="inference_only") as engine:
        handle = engine.finetune(job("trained"))
        assert answers(engine) == base and not handle.losses
        engine.set_policy("temporal_sharing", {"n": 4})
        assert (engine.config.policy, engine.config.options) == ("temporal_sharing", {"n": 4})
        assert answers(engine) == base
        assert handle.wait(timeout=120) == "succeeded", handle.error
        assert handle.losses == [pytest.approx(loss, rel=1e-4) for loss in losses]
        engine.set_policy("inference_only")
        waiting = engine.finetune(job("other"))
        assert answers(engine) == base and not waiting.losses
        waiting.cancel()


@pytest.mark.parametrize(
    ("policy", "options", "message"),
    [
        ("luck", {}, "policy is 'luck'; it must be one of"),
        ("temporal_sharing", {"m": 3}, r"policy 'temporal_sharing' takes the options \(n, stretch\)"),
        ("co_serve", {}, "policy is 'co_serve' without an objective; set tpot_objective_ms"),
        (
            "fixed_budget",
            {"finetune_tokens": 64, "backward_units": 2, "layout": SlotLayout(4, 128, tape=True)},
            "policy is 'fixed_budget' after 'flat_out', and one of them keeps to SlotLayout.rows=4.*start an",
        ),
    ],
)
def test_a_policy_that_cannot_follow_is_refused(engine, policy, options, message):
    with pytest.raises(ValueError, match=message):
        engine.set_policy(policy, options)
    assert engine.config.policy == "flat_out" and type(engine.scheduler.policy) is POLICIES["flat_out"]
