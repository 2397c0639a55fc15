"""Requests through the whole engine: what comes out is what the dense model says, whatever runs beside it."""

import queue
import threading

import numpy as np
import pytest

from flexjax.engine.adapters import UnknownAdapter
from flexjax.engine.loop import EngineStopped
from flexjax.engine.submission import Submission
from flexjax.request import SamplingParams
from tests.ladder import Model
from tests.tiny_model import CONFIG

PROMPTS = [list(b"hello there"), list(range(70, 170)), [7], list(b"a b c d e f g" * 9)]


def greedy(tokens: int, **settings) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, **settings)


def dense_continuation(prompt: list[int], count: int) -> list[int]:
    model, tokens = Model.random(CONFIG).dense, list(prompt)
    for _ in range(count):
        tokens.append(int(model.logits(np.array(tokens))[-1].argmax()))
    return tokens[len(prompt) :]


@pytest.fixture(scope="module")
def expected() -> list[list[int]]:
    return [dense_continuation(prompt, 12) for prompt in PROMPTS]


def test_greedy_answers_are_the_dense_models(engine, expected):
    outputs = engine.generate(PROMPTS, greedy(12))
    assert [output.token_ids for output in outputs] == expected
    assert {output.finish_reason for output in outputs} == {"length"}
    assert [output.prompt_token_ids for output in outputs] == PROMPTS


def test_more_requests_than_rows_are_all_answered(engine, expected):
    outputs = engine.generate(PROMPTS * 3, greedy(12))
    assert [output.token_ids for output in outputs] == expected * 3


def test_prompts_given_together_begin_together(engine):
    """In the very first step, which has room for two tiles."""
    before = len(engine.loop.records)
    prompts = [list(range(start, start + 20)) for start in (0, 30)]
    engine.generate(prompts, greedy(4))
    assert next(record.prompt_slots for record in list(engine.loop.records)[before:] if record.prompt_slots) == 40


def test_a_prefix_is_computed_once(engine, expected):
    before = engine.scheduler.statistics.prefix_hits
    engine.generate([PROMPTS[1]], greedy(12))
    again = engine.generate([PROMPTS[1]], greedy(12))
    assert engine.scheduler.statistics.prefix_hits > before
    assert again[0].token_ids == expected[1]


def test_requests_preempted_for_pages_lose_nothing(new_engine):
    prompts = [list(range(start, start + 60)) for start in range(0, 160, 40)]
    with new_engine(prefix_caching=False) as roomy:
        expected = [output.token_ids for output in roomy.generate(prompts, greedy(80))]
    with new_engine(pages=8, prefix_caching=False) as narrow:
        outputs = narrow.generate(prompts, greedy(80))
        assert narrow.scheduler.statistics.preemptions > 0
        narrow.loop.call(narrow.scheduler.check)
    assert [output.token_ids for output in outputs] == expected


def test_a_stream_grows_to_what_generate_returns(engine):
    whole = engine.generate(["hello"], greedy(20))[0]
    pieces = list(engine.stream("hello", greedy(20)))
    assert pieces[-1].token_ids == whole.token_ids and pieces[-1].text == whole.text
    assert [len(piece.token_ids) for piece in pieces] == list(range(1, 21))
    assert all(whole.text.startswith(piece.text) for piece in pieces)


def test_closing_a_stream_frees_its_row(engine):
    stream = engine.stream("hello", greedy(200))
    next(stream)
    stream.close()
    assert engine.loop.call(lambda: engine.scheduler.statistics.running) == 0


def test_cancelled_requests_say_abort(engine):
    listener = queue.SimpleQueue()
    ids = engine.submit(list(b"hello"), greedy(200), None, listener)
    assert listener.get(timeout=30).finish_reason is None
    engine.cancel(ids)
    last = None
    while last is None or last.finish_reason is None:
        last = listener.get(timeout=30)
    assert last.finish_reason == "abort"
    engine.cancel(ids)  # once more does nothing


def test_stop_strings_and_stop_ids_end_an_answer(engine):
    whole = engine.generate([PROMPTS[0]], greedy(20))[0]
    stop_id = whole.token_ids[5]
    first = whole.token_ids.index(stop_id)
    stopped = engine.generate([PROMPTS[0]], greedy(20, stop_token_ids=(stop_id,)))[0]
    assert stopped.finish_reason == "stop" and stopped.token_ids == whole.token_ids[: first + 1]
    text = next(piece for piece in (whole.text[k : k + 2] for k in range(4, 12)) if piece.isprintable())
    cut = engine.generate([PROMPTS[0]], greedy(20, stop=text))[0]
    assert cut.finish_reason == "stop" and cut.text == whole.text[: whole.text.index(text)]
    kept = engine.generate([PROMPTS[0]], greedy(20, stop=text, include_stop_str_in_output=True))[0]
    assert kept.text == cut.text + text


def test_min_tokens_holds_stop_ids_back(engine):
    whole = engine.generate([PROMPTS[0]], greedy(20))[0]
    held = engine.generate([PROMPTS[0]], greedy(20, stop_token_ids=(whole.token_ids[0],), min_tokens=3))[0]
    assert len(held.token_ids) >= 3 and whole.token_ids[0] not in held.token_ids[:3]


def test_logprobs_are_the_dense_models(engine):
    prompt = PROMPTS[0]
    output = engine.generate([prompt], greedy(4, logprobs=3, prompt_logprobs=2))[0]
    wanted = Model.random(CONFIG).dense.logprobs(np.array(prompt + output.token_ids))
    assert output.prompt_logprobs[0] is None and len(output.prompt_logprobs) == len(prompt)
    entries = output.prompt_logprobs[1:] + output.logprobs
    tokens = (prompt + output.token_ids)[1:]
    for position, (entry, token) in enumerate(zip(entries, tokens, strict=True)):
        assert token in entry
        for each, value in entry.items():
            assert value == pytest.approx(wanted[position, each], abs=2e-4)
        count = 2 if position < len(prompt) - 1 else 3
        assert set(np.argsort(-wanted[position])[:count]) <= set(entry)


def test_samples_follow_the_seed_and_not_the_neighbours(engine):
    params = SamplingParams(temperature=1.5, seed=11, max_tokens=16, ignore_eos=True, n=2)
    alone = engine.generate([PROMPTS[0]], params)
    crowd = engine.generate([PROMPTS[1], PROMPTS[0], PROMPTS[3]], params)[2:4]
    assert [output.token_ids for output in alone] == [output.token_ids for output in crowd]
    assert [output.index for output in crowd] == [0, 1]
    assert alone[0].token_ids != alone[1].token_ids


def test_chat_goes_through_the_template(engine):
    output = engine.chat([[{"role": "user", "content": "hi"}]], greedy(3))[0]
    user, assistant, end = 257, 258, 256
    letters = engine.encode("hi")
    assert output.prompt_token_ids == [user, *letters, end, assistant]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "the prompt has 0 tokens"),
        ([5] * 256, "the prompt has 256 tokens; it needs 1 to 255, since max_model_len is 256"),
        ([5, 259], "token id 259; the model's ids are 0 to 258"),
    ],
)
def test_prompts_that_cannot_run_are_refused(engine, prompt, message):
    with pytest.raises(ValueError, match=message):
        engine.generate([prompt], greedy(2))


def test_an_unknown_adapter_is_an_error_and_never_the_base_model(engine):
    with pytest.raises(UnknownAdapter, match="'nobody' is not loaded; loaded adapters: none"):
        engine.generate(["hello"], greedy(2), adapter="nobody")


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [({"adapter": "nobody"}, UnknownAdapter, "'nobody' is not"), ({"prompt": [5] * 256}, ValueError, "256 tokens")],
)
def test_if_one_of_several_prompts_is_refused_none_is_queued(engine, wrong, error, message):
    good = Submission(list(b"hello"), greedy(200), None, queue.SimpleQueue())
    with pytest.raises(error, match=message):
        engine.submit_all([good, good._replace(**wrong)])
    statistics = engine.loop.call(lambda: engine.scheduler.statistics)
    assert statistics.running == statistics.waiting == 0 and good.listener.empty()


def test_answers_end_at_the_context_limit(engine):
    output = engine.generate([[5] * 250], greedy(100))[0]
    assert len(output.token_ids) == 6 and output.finish_reason == "length"


def test_closing_ends_what_runs_and_refuses_what_comes(new_engine):
    engine = new_engine()
    listener = queue.SimpleQueue()
    engine.submit(list(b"hello"), greedy(240), None, listener)
    listener.get(timeout=30)
    engine.close()
    last = listener.get(timeout=30)
    while last.finish_reason is None:
        last = listener.get(timeout=30)
    assert last.finish_reason == "abort"
    with pytest.raises(EngineStopped, match="the engine has stopped"):
        engine.generate(["hello"], greedy(2))


def test_a_dying_device_thread_tells_everybody(new_engine, monkeypatch, caplog):
    engine = new_engine()
    listener = queue.SimpleQueue()
    monkeypatch.setattr(engine._runner, "dispatch_forward", lambda *_: 1 / 0)
    engine.submit(list(b"hello"), greedy(240), None, listener)
    last = listener.get(timeout=30)
    assert last.finish_reason == "error" and "division by zero" in last.error
    with pytest.raises(EngineStopped):
        engine.generate(["hello"], greedy(2))
    assert "the engine's thread died" in caplog.text


def test_threads_may_ask_at_the_same_time(engine, expected):
    answers = {}

    def ask(index: int) -> None:
        answers[index] = engine.generate([PROMPTS[index]], greedy(12))[0].token_ids

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [answers[index] for index in range(4)] == expected
