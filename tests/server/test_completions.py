"""/v1/completions through the unmodified ``openai`` client: what comes back is what the engine says."""

import numpy as np
import openai
import pytest

from flexjax.request import SamplingParams
from flexjax.tokenizer import Tokenizer
from tests.ladder import Model
from tests.server.conftest import ADAPTERS, factors
from tests.tiny_model import CONFIG

PROMPT = "hello there"
IDS = [list(b"hello there"), list(range(70, 170)), [7]]
GREEDY = {"temperature": 0, "extra_body": {"ignore_eos": True}}


def engine_answers(engine, prompts, adapter=None, **settings):
    return engine.generate(prompts, SamplingParams(**{"temperature": 0.0, "ignore_eos": True, **settings}), adapter)


def complete(client, **body):
    return client.completions.create(**{"model": "tiny", "prompt": PROMPT, "max_tokens": 8, **GREEDY, **body})


def test_a_text_is_continued(client, engine):
    answer = complete(client)
    (expected,) = engine_answers(engine, [PROMPT], max_tokens=8)
    assert answer.id.startswith("cmpl-") and answer.object == "text_completion" and answer.model == "tiny"
    assert answer.system_fingerprint is None and answer.created > 1_700_000_000
    (choice,) = answer.choices
    assert (choice.index, choice.text, choice.finish_reason) == (0, expected.text, "length")
    assert choice.logprobs is None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (11, 8, 19)


def dense_text(tokenizer: Tokenizer, prompt: list[int], count: int, adapter: str | None) -> str:
    """The float64 model's greedy continuation."""
    model, tokens = Model.random(CONFIG).dense, list(prompt)
    pairs = None if adapter is None else factors(ADAPTERS[adapter])
    for _ in range(count):
        tokens.append(int(model.logits(np.array(tokens), pairs, 2.0)[-1].argmax()))
    return tokenizer.decode(tokens[len(prompt) :])


def test_base_and_adapters_answer_by_name_as_the_dense_model_does(client, engine, adapter_dir):
    for name in ADAPTERS:
        engine.load_adapter(name, adapter_dir / name)
    prompt = IDS[0]
    texts = {name: complete(client, model=name, prompt=prompt).choices[0].text for name in ("tiny", *ADAPTERS)}
    for name in ADAPTERS:
        engine.unload_adapter(name)
    assert texts == {name: dense_text(engine.tokenizer, prompt, 8, None if name == "tiny" else name) for name in texts}
    assert len(set(texts.values())) == 3


@pytest.mark.parametrize("prompts", [["a", "b c"], IDS])
def test_batches_and_samples_are_numbered_prompt_by_prompt(client, engine, prompts):
    answer = complete(client, prompt=prompts, n=2, seed=5, temperature=1.0)
    expected = engine_answers(engine, prompts, n=2, seed=5, temperature=1.0, max_tokens=8)
    assert [choice.text for choice in answer.choices] == [output.text for output in expected]
    assert [choice.index for choice in answer.choices] == list(range(2 * len(prompts)))
    assert answer.usage.prompt_tokens == sum(len(output.prompt_token_ids) for output in expected[::2])
    assert answer.usage.completion_tokens == 16 * len(prompts)


def test_a_seed_repeats_and_another_does_not(client):
    texts = [complete(client, seed=seed, temperature=1.0).choices[0].text for seed in (3, 3, 4)]
    assert texts[0] == texts[1] != texts[2]


def test_a_stop_string_ends_the_text_before_it(client, engine):
    (whole,) = engine_answers(engine, [PROMPT], max_tokens=40)
    letter = next(character for character in whole.text[1:] if character != "\N{REPLACEMENT CHARACTER}")
    answer = complete(client, max_tokens=40, stop=[letter, "never"])
    (expected,) = engine_answers(engine, [PROMPT], max_tokens=40, stop=(letter,))
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].text == expected.text == whole.text[: whole.text.index(letter)]
    assert answer.usage.completion_tokens == len(expected.token_ids)


def test_log_probabilities_stand_beside_their_tokens(client, engine):
    answer = complete(client, prompt=IDS[0], logprobs=3)
    (expected,) = engine_answers(engine, [IDS[0]], max_tokens=8, logprobs=3)
    shown, word = answer.choices[0].logprobs, engine.tokenizer.token_text
    assert shown.tokens == [word(each) for each in expected.token_ids]
    chosen = [entry[each] for each, entry in zip(expected.token_ids, expected.logprobs, strict=True)]
    assert shown.token_logprobs == pytest.approx(chosen)
    for top, entry in zip(shown.top_logprobs, expected.logprobs, strict=True):
        assert set(top) == {word(each) for each in entry} and max(top.values()) == pytest.approx(max(entry.values()))
    assert shown.text_offset[0] == 0 and shown.text_offset == sorted(shown.text_offset)


def dense_logprobs(tokens: list[int]) -> np.ndarray:
    """Log-probabilities of each token after those before it, [len(tokens) - 1] float64."""
    logits = Model.random(CONFIG).dense.logits(np.array(tokens))[:-1]
    values = logits - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
    values -= logits.max(-1, keepdims=True)
    return values[np.arange(len(tokens) - 1), tokens[1:]]


@pytest.mark.parametrize("count", [0, 2])
def test_echo_shows_the_prompt_and_its_log_probabilities(client, engine, count):
    """As evaluation harnesses ask for it; with no tokens wanted there is only the prompt."""
    prompt = IDS[0]
    answer = complete(client, prompt=prompt, echo=True, logprobs=1, max_tokens=count)
    (expected,) = engine_answers(engine, [prompt], max_tokens=2)
    tokens = prompt + expected.token_ids[:count]
    choice, shown = answer.choices[0], answer.choices[0].logprobs
    assert choice.text == engine.tokenizer.decode(prompt) + (expected.text if count else "")
    assert shown.tokens == [engine.tokenizer.token_text(each) for each in tokens]
    assert shown.token_logprobs[0] is None and shown.top_logprobs[0] is None
    assert shown.token_logprobs[1:] == pytest.approx(dense_logprobs(tokens), abs=1e-4)
    for token, top, own in list(zip(shown.tokens, shown.top_logprobs, shown.token_logprobs, strict=True))[1:]:
        assert token in top and max(top.values()) >= own
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(prompt), count)


def test_text_offsets_point_into_the_text(client):
    """The model's tokens are bytes: a character begins where its first byte stands."""
    answer = complete(client, prompt="naïve", echo=True, logprobs=0, max_tokens=1)
    assert answer.choices[0].text.startswith("naïve")
    assert answer.choices[0].logprobs.text_offset == [0, 1, 2, 2, 3, 4, 5]
    assert answer.choices[0].logprobs.tokens[4:6] == ["v", "e"]


def test_echo_without_log_probabilities(client, engine):
    answer = complete(client, prompt=["one", "two"], echo=True, n=2)
    expected = engine_answers(engine, ["one", "two"], max_tokens=8, n=2)
    texts = [prompt + output.text for prompt, output in zip(["one", "one", "two", "two"], expected, strict=True)]
    assert [choice.text for choice in answer.choices] == texts


@pytest.mark.parametrize("settings", [{}, {"echo": True}, {"n": 2, "seed": 1, "temperature": 1.0}, {"logprobs": 2}])
def test_a_stream_adds_up_to_the_whole(client, settings):
    body = {"prompt": ["hello", "there"], "max_tokens": 12, **settings}
    whole = complete(client, **body)
    chunks = list(complete(client, stream=True, stream_options={"include_usage": True}, **body))
    *pieces, last = chunks
    assert last.choices == [] and last.usage == whole.usage
    assert {(chunk.object, chunk.model, chunk.usage) for chunk in pieces} == {("text_completion", "tiny", None)}
    assert len({chunk.id for chunk in chunks}) == 1
    for choice in whole.choices:
        mine = [chunk.choices[0] for chunk in pieces if chunk.choices[0].index == choice.index]
        assert "".join(each.text for each in mine) == choice.text
        assert [each.finish_reason for each in mine] == [None] * (len(mine) - 1) + ["length"]
        if choice.logprobs is not None:
            for name in ("tokens", "token_logprobs", "text_offset"):
                joined = [value for each in mine for value in getattr(each.logprobs, name)]
                expected = getattr(choice.logprobs, name)
                assert joined == (pytest.approx(expected) if name == "token_logprobs" else expected)
            tops = [top for each in mine for top in each.logprobs.top_logprobs]
            assert [set(top) for top in tops] == [set(top) for top in choice.logprobs.top_logprobs]


def test_a_stream_without_usage_has_none(client):
    assert all(chunk.usage is None and chunk.choices for chunk in complete(client, stream=True))


def test_a_stream_with_running_usage_has_it_everywhere(client):
    options = {"include_usage": True, "continuous_usage_stats": True}
    counts = [chunk.usage.completion_tokens for chunk in complete(client, stream=True, stream_options=options)]
    assert counts == sorted(counts) and counts[-1] == 8


@pytest.mark.parametrize(
    ("body", "kind", "param", "words"),
    [
        ({"suffix": "end"}, openai.BadRequestError, "suffix", "not supported"),
        ({"best_of": 2}, openai.BadRequestError, "best_of", "not supported"),
        ({"max_tokens": 0}, openai.BadRequestError, "max_tokens", "max_tokens is 0"),
        ({"prompt": []}, openai.BadRequestError, "prompt", "not empty"),
        ({"prompt": [300]}, openai.BadRequestError, "prompt", "token id 300"),
        ({"prompt": [5] * 256}, openai.BadRequestError, "prompt", "maximum context length is 256 tokens"),
        ({"logprobs": 21}, openai.BadRequestError, "logprobs", "logprobs is 21"),
        ({"echo": "yes"}, openai.BadRequestError, "echo", "true or false"),
        ({"stream_options": {"include_usage": True}}, openai.BadRequestError, "stream_options", "stream to be true"),
        (
            {"stream": True, "stream_options": {"usage": True}},
            openai.BadRequestError,
            "stream_options",
            "unknown field stream_options.usage",
        ),
        ({"extra_body": {"prompt_logprobs": 1}}, openai.BadRequestError, "prompt_logprobs", "echo"),
        ({"extra_body": {"temprature": 1}}, openai.BadRequestError, "temprature", "did you mean 'temperature'"),
        ({"model": "ghost"}, openai.NotFoundError, "model", "The model 'ghost' does not exist."),
        ({"model": "ghost", "stream": True}, openai.NotFoundError, "model", "The model 'ghost' does not exist."),
        ({"n": 129}, openai.BadRequestError, "n", "n is 129"),
        ({"prompt": ""}, openai.BadRequestError, "prompt", "no tokens"),
    ],
)
def test_mistakes_become_the_clients_exceptions(client, body, kind, param, words):
    with pytest.raises(kind) as caught:
        complete(client, **body)
    error = caught.value.body
    assert set(error) == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"
    assert error["param"] == param and words in error["message"]
    codes = {"The model 'ghost' does not exist.": "model_not_found", "maximum context": "context_length_exceeded"}
    assert error["code"] == next((code for part, code in codes.items() if part in words), None)
