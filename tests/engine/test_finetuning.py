"""Finetuning jobs through the whole engine: alone, beside requests, and when they go wrong."""

import gc
import queue
import threading
import weakref

import numpy as np
import pytest

from flexjax.engine.adapters import NoRoomForAdapter, UnknownAdapter
from flexjax.engine.interpreter import set_aside
from flexjax.fields import ConfigError
from flexjax.finetuning.dataset import Example
from flexjax.request import SamplingParams
from flexjax.weights.peft import read_adapter
from tests.engine.conftest import ROWS, job
from tests.ladder import Model
from tests.tiny_model import CONFIG


def greedy(tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)


def finished(handle, status="succeeded"):
    assert handle.wait(timeout=120) == status, handle.error
    return handle


def difference(one, other) -> float:
    """Largest difference of two adapters' products A B, relative to the largest product."""
    gaps, sizes = [], []
    for name in one.weights:
        for layer in range(CONFIG.num_layers):
            gaps.append(np.abs(one.delta(name, layer) - other.delta(name, layer)).max())
            sizes.append(np.abs(one.delta(name, layer)).max())
    return max(gaps) / max(sizes)


@pytest.fixture(scope="module")
def alone(engine):
    """An adapter trained while nothing else ran, and its losses."""
    handle = finished(engine.finetune(job("alone")))
    return engine.adapter("alone"), handle.losses


def test_the_loss_is_the_dense_models_and_falls(engine, alone):
    _, losses = alone
    assert len(losses) == 4 and losses[-1] < losses[0]
    handle = finished(engine.finetune(job("once", batch_size=len(ROWS), epochs=1, learning_rate=1e-9)))
    sequences, targets = [], []
    for row in ROWS:
        prompt, completion = engine.encode(row["prompt"]), engine.encode(row["completion"])
        sequences.append(np.array([*prompt, *completion, 256]))
        targets.append(np.arange(len(sequences[-1])) >= len(prompt))
    model = Model.random(CONFIG)
    adapter = model.factors(4, seed=0)
    adapter["b"] = {name: 0 * b for name, b in adapter["b"].items()}
    loss, _ = model.dense.loss_and_gradients(sequences, targets, adapter, 2.0)
    assert handle.losses == [pytest.approx(loss, rel=1e-5)]


def test_a_finished_adapter_serves_at_once_and_the_base_is_as_before(engine):
    base = engine.generate(["1 and 2 make"], greedy(30))[0]
    assert " of them, said number" not in base.text
    with pytest.raises(UnknownAdapter):
        engine.generate(["1 and 2 make"], greedy(12), adapter="taught")
    handle = finished(engine.finetune(job("taught", epochs=20)))
    assert handle.losses[-1] < 0.2 * handle.losses[0]
    taught = engine.generate(["1 and 2 make"], greedy(30), adapter="taught")[0].text
    assert " of them, said number" in taught
    assert engine.generate(["1 and 2 make"], greedy(30))[0].token_ids == base.token_ids


def test_co_served_is_served_alone_and_co_trained_is_trained_alone(engine, alone):
    adapter, losses = alone
    prompts = [list(range(start, start + 70)) for start in range(0, 180, 9)]
    expected = [output.token_ids for output in engine.generate(prompts, greedy(40))]
    earlier = len(engine.loop.records)
    engine.scheduler.forget_adapter(0)
    answers = {}

    def ask(part: int) -> None:
        for number in range(part, len(prompts), 4):
            answers[number] = engine.generate([prompts[number]], greedy(40))[0].token_ids

    handle = engine.finetune(job("beside"))
    threads = [threading.Thread(target=ask, args=(part,)) for part in range(4)]
    for thread in threads:
        thread.start()
    finished(handle)
    for thread in threads:
        thread.join()
    beside = list(engine.loop.records)[earlier:]
    mixed = [r for r in beside if r.decode_slots and (r.finetune_slots or r.backward_units)]
    assert mixed, "nothing was co-served"
    assert [answers[number] for number in range(len(prompts))] == expected
    assert handle.losses == [pytest.approx(loss, rel=1e-4) for loss in losses]
    assert difference(adapter, engine.adapter("beside")) < 1e-3


def test_two_jobs_and_their_adapters_do_not_mix(engine, alone):
    adapter, _ = alone
    first = engine.finetune(job("first"))
    second = engine.finetune(job("second", rank=8, target_modules=("q_proj", "down_proj"), seed=5))
    finished(first), finished(second)
    assert difference(adapter, engine.adapter("first")) < 1e-3
    assert engine.adapter("second").target_modules == ("q_proj", "down_proj")
    assert engine.adapters.find("second").products == (0, 3) != engine.adapters.find("first").products
    both = engine.generate(["2 and 2 make"], greedy(8), adapter="first")
    assert both[0].token_ids == engine.generate(["2 and 2 make"], greedy(8), adapter="alone")[0].token_ids
    for name in ("first", "second"):
        engine.unload_adapter(name)


def test_validation_dropout_and_a_starting_adapter(engine):
    settings = dict(validation=list(ROWS[:4]), dropout=0.2, evaluate_every=2, optimizer="adam", max_grad_norm=0.5)
    handle = finished(engine.finetune(job("noisy", **settings, init_adapter="taught", learning_rate=1e-4)))
    evaluations = [event for event in handle.events() if event["type"] == "evaluation"]
    assert [event["step"] for event in evaluations] == [2, 4]
    assert evaluations[0]["loss"] < 1.0, "it started from an adapter that knows these rows"
    assert engine.adapter("noisy").dropout in (0.0, 0.2)


def test_exported_and_loaded_again_it_is_the_same_adapter(engine, tmp_path):
    engine.export_adapter("taught", tmp_path / "taught")
    engine.load_adapter("again", tmp_path / "taught")
    one, other = (engine.generate(["3 and 1 make"], greedy(20), adapter=name)[0] for name in ("taught", "again"))
    assert one.token_ids == other.token_ids
    assert difference(read_adapter(tmp_path / "taught", CONFIG), engine.adapter("taught")) == 0


def test_a_replaced_adapter_keeps_serving_those_who_began_with_it(engine, tmp_path):
    engine.export_adapter("taught", tmp_path / "taught")
    engine.export_adapter("alone", tmp_path / "alone")
    engine.load_adapter("swapped", tmp_path / "taught")
    prompt = list(b"3 and 0 make")
    expected = engine.generate([prompt], greedy(100), adapter="taught")[0].token_ids
    other = engine.generate([prompt], greedy(30), adapter="alone")[0].token_ids
    assert other != expected[:30]
    listener = queue.SimpleQueue()
    engine.submit(prompt, greedy(100), "swapped", listener)
    listener.get(timeout=30)
    engine.load_adapter("swapped", tmp_path / "alone")
    assert engine.generate([prompt], greedy(30), adapter="swapped")[0].token_ids == other
    last = listener.get(timeout=30)
    while last.finish_reason is None:
        last = listener.get(timeout=30)
    assert last.token_ids == expected
    engine.unload_adapter("swapped")


def test_a_loss_that_is_no_number_fails_the_job_and_serving_goes_on(engine):
    expected = engine.generate(["hello"], greedy(8))[0].token_ids
    handle = engine.finetune(job("broken", learning_rate=1e25, optimizer="sgd", max_grad_norm=None, epochs=4))
    finished(handle, "failed")
    assert "at step" in handle.error and "its data rows are" in handle.error
    assert engine.generate(["hello"], greedy(8))[0].token_ids == expected
    with pytest.raises(UnknownAdapter):
        engine.generate(["hello"], greedy(8), adapter="broken")


def test_pause_holds_a_job_and_cancel_ends_it(engine):
    handle = engine.finetune(job("held", epochs=500))
    while not handle.losses:
        assert handle.wait(timeout=0.05) in ("queued", "running"), handle.error
    handle.pause()
    engine.generate(["hello"], greedy(4))
    steps = len(handle.losses)
    units = sum(record.backward_units for record in engine.loop.records)
    engine.generate(["hello"], greedy(10))
    assert handle.status == "paused" and len(handle.losses) <= steps + 1
    assert sum(record.backward_units for record in engine.loop.records) == units
    handle.resume()
    while len(handle.losses) < steps + 3:
        assert handle.wait(timeout=0.05) == "running"
    handle.cancel()
    assert handle.status == "cancelled"
    with pytest.raises(ConfigError, match="is cancelled"):
        handle.resume()
    engine.loop.call(engine.scheduler.check)


def test_of_jobs_that_have_ended_only_what_they_reported_is_kept(engine):
    """A service that runs for months has had many."""
    handles, large = {}, {}
    for name, epochs in {"succeeds": 2, "is cancelled": 500}.items():
        handles[name] = engine.finetune(job(name, epochs=epochs))
        found = engine.trainer.jobs[name]
        large[name] = [weakref.ref(each) for each in (found.run.train, found.adapter)]
    del found
    finished(handles["succeeds"])
    while not handles["is cancelled"].losses:
        assert handles["is cancelled"].wait(timeout=0.05) in ("queued", "running")
    handles["is cancelled"].cancel()
    engine.generate(["hello"], greedy(10))
    gc.collect()
    assert [each() for held in large.values() for each in held] == [None] * 4
    assert len(handles["succeeds"].losses) == handles["succeeds"].total_steps == 4
    assert [event["type"] for event in handles["succeeds"].events()].count("step") == 4
    for handle in handles.values():
        with pytest.raises(ConfigError, match="it cannot become paused"):
            handle.pause()


class Row(dict):
    """One that can be told from others."""


def searched(kind: type) -> int:
    """Objects of a kind that a search for garbage visits."""
    return sum(type(each) is kind for each in gc.get_objects())


def test_what_a_job_was_made_from_is_not_kept(engine):
    row = Row(ROWS[0])
    gone, handle = weakref.ref(row), engine.finetune(job("made", data=[row] * 8, epochs=1, learning_rate=0.0))
    del row
    assert gone() is None
    finished(handle)


def test_what_a_job_has_read_is_not_searched_for_garbage(engine):
    """Neither what the caller keeps nor what the job works with, from the moment that it is queued."""
    rows = [Row(ROWS[0]) for _ in range(500)]
    assert searched(Row) == 500
    handle = engine.finetune(job("read", data=rows), paused=True)
    assert len(engine.trainer.jobs["read"].run.train.examples) == 500
    assert (searched(Row), searched(Example)) == (0, 0)
    handle.cancel()


def test_a_request_under_way_when_a_job_comes_goes_when_it_ends(engine):
    """Without a search, which would not find it any more."""
    loop, stream = engine.loop, engine.stream("hello", greedy(200))
    next(stream)

    def under_way() -> list[weakref.ref]:
        set_aside()
        return [weakref.ref(each) for held in (loop.serving, loop.delivery.collectors) for each in held.values()]

    held = loop.call(under_way)
    assert len(held) == 2 and len(list(stream)) > 0
    engine.generate(["hello"], greedy(2))
    assert [each() for each in held] == [None, None]


def test_jobs_beyond_the_seats_wait(new_engine):
    with new_engine(max_running_jobs=1) as engine:
        first, second = engine.finetune(job("first")), engine.finetune(job("second"))
        finished(first), finished(second)
        starts = {h.name: [e["time"] for e in h.events() if e.get("status") == "running"] for h in (first, second)}
        ends = [event["time"] for event in first.events() if event.get("status") == "succeeded"]
        assert starts["second"] >= ends


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(data=[]), "no rows|empty"),
        (dict(data=[{"prompt": "a"}]), "row 1"),
        (dict(max_length=999), "max_length is 999; max_model_len is 256"),
    ],
)
def test_jobs_that_cannot_run_are_refused(engine, settings, message):
    with pytest.raises(ConfigError, match=message):
        engine.finetune(job("refused", **settings))


def test_a_job_takes_a_place_that_nobody_holds_and_keeps_it(new_engine, engine, tmp_path):
    """There is one place. While a job has it, who asks for an adapter is told so; afterwards everybody is served."""
    for name in ("taught", "alone"):
        engine.export_adapter(name, tmp_path / name)
    expected = {name: engine.generate(["3 and 1 make"], greedy(20), name)[0].token_ids for name in ("taught", "alone")}
    with new_engine(max_adapters=1, adapter_rank_capacity=8) as narrow:
        for name in expected:
            narrow.load_adapter(name, tmp_path / name)
        answers = lambda: {name: narrow.generate(["3 and 1 make"], greedy(20), name)[0].token_ids for name in expected}
        assert answers() == expected
        handle = narrow.finetune(job("third", epochs=20))
        while not handle.losses:
            assert handle.wait(timeout=0.01) in ("queued", "running"), handle.error
        handle.pause()
        with pytest.raises(NoRoomForAdapter, match="'taught' finds no place beside the running jobs third.* max_adapt"):
            narrow.generate(["3 and 1 make"], greedy(20), "taught")
        handle.resume()
        finished(handle)
        assert answers() == expected
        assert narrow.generate(["3 and 1 make"], greedy(20), "third")[0].token_ids
        with pytest.raises(NoRoomForAdapter, match="raise adapter_rank_capacity"):
            narrow.finetune(job("large", rank=9))
