"""/v1/chat/completions through the unmodified ``openai`` client, answers compared with the engine's own."""

import asyncio

import openai
import pytest

from flexjax.request import SamplingParams

HELLO = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
GREEDY = {"temperature": 0, "extra_body": {"ignore_eos": True}}


def body(**settings):
    return {"model": "tiny", "messages": HELLO, "max_completion_tokens": 8, **GREEDY, **settings}


def chat(client, **settings):
    return client.chat.completions.create(**body(**settings))


def engine_answer(engine, **settings):
    return engine.chat([HELLO], SamplingParams(**{"temperature": 0.0, "ignore_eos": True, "max_tokens": 8, **settings}))


def test_a_conversation_is_answered(client, engine):
    answer = chat(client)
    (expected,) = engine_answer(engine)
    assert answer.id.startswith("chatcmpl-") and answer.object == "chat.completion" and answer.model == "tiny"
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content, choice.message.refusal) == ("assistant", expected.text, None)
    assert choice.finish_reason == "length" and choice.logprobs is None and answer.system_fingerprint is None
    prompt = len(expected.prompt_token_ids)
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (
        prompt,
        8,
        prompt + 8,
    )


@pytest.mark.parametrize(
    "settings",
    [
        {"n": 3, "seed": 7, "temperature": 1.0},
        {"seed": 7, "temperature": 1.0, "presence_penalty": 1.5, "frequency_penalty": 0.5, "top_p": 0.9},
    ],
)
def test_sampling_is_the_engines(client, engine, settings):
    texts = [choice.message.content for choice in chat(client, **settings).choices]
    assert texts == [output.text for output in engine_answer(engine, **settings)]


def test_a_stop_token_ends_the_turn_and_is_not_shown(client, engine):
    (whole,) = engine_answer(engine)
    last = next(place for place, token in enumerate(whole.token_ids) if place and token not in whole.token_ids[:place])
    answer = chat(client, extra_body={"stop_token_ids": [whole.token_ids[last]]})
    choice = answer.choices[0]
    assert (choice.finish_reason, answer.usage.completion_tokens) == ("stop", last + 1)
    assert choice.message.content == engine.tokenizer.decode(whole.token_ids[:last])


def test_log_probabilities_have_the_bytes_of_their_tokens(client, engine):
    answer = chat(client, logprobs=True, top_logprobs=3)
    (expected,) = engine_answer(engine, logprobs=3)
    content = answer.choices[0].logprobs.content
    assert b"".join(bytes(each.bytes) for each in content).decode(errors="replace") == expected.text
    for shown, token, entry in zip(content, expected.token_ids, expected.logprobs, strict=True):
        assert shown.token == engine.tokenizer.token_text(token)
        assert shown.logprob == pytest.approx(entry[token])
        best = sorted(entry.values(), reverse=True)[:3]
        assert [top.logprob for top in shown.top_logprobs] == pytest.approx(best)


def test_log_probabilities_without_alternatives(client):
    content = chat(client, logprobs=True).choices[0].logprobs.content
    assert len(content) == 8 and all(each.top_logprobs == [] and each.logprob < 0 for each in content)


@pytest.mark.parametrize("settings", [{}, {"logprobs": True, "top_logprobs": 2}, {"n": 2, "seed": 1, "temperature": 1}])
def test_a_stream_adds_up_to_the_whole(client, settings):
    whole = chat(client, **settings)
    *pieces, last = chat(client, stream=True, stream_options={"include_usage": True}, **settings)
    assert last.choices == [] and last.usage == whole.usage
    assert {(chunk.object, chunk.id) for chunk in pieces} == {("chat.completion.chunk", last.id)}
    for choice in whole.choices:
        first, *mine, end = [chunk.choices[0] for chunk in pieces if chunk.choices[0].index == choice.index]
        assert (first.delta.role, first.delta.content, first.finish_reason) == ("assistant", "", None)
        assert (end.delta.content, end.finish_reason) == (None, "length")
        assert "".join(each.delta.content for each in mine) == choice.message.content
        if choice.logprobs is not None:
            tokens = [token.token for each in mine for token in each.logprobs.content]
            assert tokens == [token.token for token in choice.logprobs.content]


def test_the_clients_stream_helper_understands_the_stream(client, engine):
    """It takes only answers that ended by themselves."""
    (whole,) = engine_answer(engine)
    settings = {"extra_body": {"stop_token_ids": whole.token_ids[-1:]}}
    with client.chat.completions.stream(**body(**settings)) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.content == chat(client, **settings).choices[0].message.content


def test_many_conversations_at_once(server, engine):
    """More than there are rows, through the asynchronous client."""

    async def ask(client, seed: int):
        stream = await client.chat.completions.create(**body(seed=seed, temperature=1.0, stream=True))
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async def ask_all():
        async with server.async_client() as client:
            return await asyncio.gather(*(ask(client, seed) for seed in range(12)))

    expected = [engine_answer(engine, seed=seed, temperature=1.0)[0].text for seed in range(12)]
    assert asyncio.run(ask_all()) == expected


@pytest.mark.parametrize(
    ("settings", "param", "words"),
    [
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools", "not supported"),
        ({"response_format": {"type": "json_object"}}, "response_format", "not supported"),
        ({"logit_bias": {"5": 1}}, "logit_bias", "not supported"),
        ({"messages": []}, "messages", "one or more"),
        ({"messages": [{"role": "tool", "content": "a", "tool_call_id": "b"}]}, "messages", "tool_call_id"),
        ({"messages": [{"role": "user", "content": "a" * 300}]}, "messages", "maximum context length is 256"),
        ({"top_logprobs": 2}, "top_logprobs", "needs logprobs"),
        ({"extra_body": {"echo": True}}, "echo", "not supported"),
    ],
)
def test_mistakes_become_the_clients_exceptions(client, settings, param, words):
    with pytest.raises(openai.BadRequestError) as caught:
        chat(client, **settings)
    assert caught.value.param == param and words in str(caught.value)
