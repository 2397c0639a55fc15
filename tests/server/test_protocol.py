"""Bodies become sampling parameters, prompts and an adapter as one writes them by hand, or are refused by name."""

import pytest

from flexjax.request import SamplingParams
from flexjax.server.prompts import BodyError
from flexjax.server.protocol import UNSUPPORTED, is_chat, translate

BASE = ("smol", "/models/smol")
DEFAULTS = {"temperature": 0.6, "top_p": 0.9}
HELLO = [{"role": "user", "content": "hello"}]


def translated(body, defaults=None):
    return translate(body, chat=is_chat(body), base_names=BASE, defaults=defaults or {})


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"prompt": "a"}, SamplingParams(max_tokens=16)),
        ({"messages": HELLO}, SamplingParams(max_tokens=None)),
        ({"prompt": "a", "max_tokens": 7, "n": 3, "seed": 5}, SamplingParams(max_tokens=7, n=3, seed=5)),
        ({"prompt": "a", "temperature": 0, "top_p": 1}, SamplingParams(temperature=0.0, top_p=1.0)),
        ({"prompt": "a", "stop": "x"}, SamplingParams(stop=("x",))),
        ({"prompt": "a", "stop": ["x", "yz"]}, SamplingParams(stop=("x", "yz"))),
        ({"prompt": "a", "logprobs": 3, "prompt_logprobs": 2}, SamplingParams(logprobs=3, prompt_logprobs=2)),
        ({"messages": HELLO, "logprobs": True}, SamplingParams(logprobs=0, max_tokens=None)),
        ({"messages": HELLO, "logprobs": True, "top_logprobs": 4}, SamplingParams(logprobs=4, max_tokens=None)),
        ({"messages": HELLO, "logprobs": False, "top_logprobs": 0}, SamplingParams(max_tokens=None)),
        ({"messages": HELLO, "max_completion_tokens": 9}, SamplingParams(max_tokens=9)),
        ({"messages": HELLO, "max_tokens": 9, "max_completion_tokens": 9}, SamplingParams(max_tokens=9)),
        (
            {"prompt": "a", "presence_penalty": 1, "frequency_penalty": -0.5, "repetition_penalty": 1.1},
            SamplingParams(presence_penalty=1.0, frequency_penalty=-0.5, repetition_penalty=1.1),
        ),
        (
            {"prompt": "a", "top_k": 40, "min_p": 0.1, "ignore_eos": True, "min_tokens": 2, "stop_token_ids": [4, 5]},
            SamplingParams(top_k=40, min_p=0.1, ignore_eos=True, min_tokens=2, stop_token_ids=(4, 5)),
        ),
        (
            {"prompt": "a", "include_stop_str_in_output": True, "skip_special_tokens": False},
            SamplingParams(include_stop_str_in_output=True, skip_special_tokens=False),
        ),
        ({"prompt": "a", "temperature": None, "stop": None, "logit_bias": None}, SamplingParams()),
    ],
)
def test_sampling_is_what_one_writes_by_hand(body, expected):
    assert translated(body).sampling == expected


@pytest.mark.parametrize(
    ("body", "defaults", "expected"),
    [
        ({"prompt": "a"}, DEFAULTS, SamplingParams(temperature=0.6, top_p=0.9)),
        ({"prompt": "a", "temperature": 0.0}, DEFAULTS, SamplingParams(temperature=0.0, top_p=0.9)),
        ({"messages": HELLO}, {"max_tokens": 99}, SamplingParams(max_tokens=99)),
        ({"messages": HELLO, "max_tokens": 3}, {"max_tokens": 99}, SamplingParams(max_tokens=3)),
    ],
)
def test_the_makers_defaults_hold_where_a_body_says_nothing(body, defaults, expected):
    assert translated(body, defaults).sampling == expected


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a", ("a",)),
        (["a", "b"], ("a", "b")),
        ([1, 2], ([1, 2],)),
        ([[1, 2], [3]], ([1, 2], [3])),
    ],
)
def test_prompts_are_texts_or_token_ids_one_or_many(prompt, expected):
    request = translated({"prompt": prompt})
    assert request.prompts == expected and request.messages == ()
    seen = []
    assert request.encode(lambda one: seen.append(one) or [len(seen)], None) == [[i + 1] for i in range(len(expected))]
    assert tuple(seen) == expected


def test_a_chat_is_one_prompt_of_plain_messages():
    parts = [{"type": "text", "text": "a "}, {"type": "text", "text": "cat"}]
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": parts, "name": "ann", "tool_calls": None},
        {"role": "assistant", "content": "meow"},
    ]
    request = translated({"messages": messages})
    plain = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "a cat", "name": "ann"},
        {"role": "assistant", "content": "meow"},
    ]
    assert request.encode(None, lambda given: given == plain) == [True]


@pytest.mark.parametrize(
    ("model", "adapter"), [(None, None), ("smol", None), ("/models/smol", None), ("poet", "poet"), ("smo", "smo")]
)
def test_model_names_the_base_or_an_adapter(model, adapter):
    assert translated({"prompt": "a", "model": model}).adapter == adapter


def test_what_is_no_sampling_is_kept_or_ignored():
    body = {"prompt": "a", "priority": -3, "stream": True, "user": "ann", "metadata": {"a": "b"}}
    request = translated(body | {"prompt_cache_key": "ann", "prompt_cache_options": {"mode": "implicit"}})
    assert (request.priority, request.stream) == (-3, True)
    assert translated({"prompt": "a"}).priority == 0 and not translated({"prompt": "a"}).stream


NEUTRAL = [(name, value) for name, values in UNSUPPORTED.items() for value in (None, *values)]


@pytest.mark.parametrize(("field", "value"), NEUTRAL)
def test_unsupported_fields_may_ask_for_nothing(field, value):
    assert translated({"prompt": "a", field: value}).sampling == SamplingParams()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("suffix", "end"),
        ("echo", True),
        ("best_of", 2),
        ("best_of", True),
        ("logit_bias", {"5": 1}),
        ("tools", [{"type": "function"}]),
        ("tool_choice", "required"),
        ("functions", [{"name": "f"}]),
        ("function_call", {"name": "f"}),
        ("response_format", {"type": "json_object"}),
        ("modalities", ["text", "audio"]),
        ("audio", {"voice": "a"}),
        ("prediction", {"type": "content"}),
        ("reasoning_effort", "low"),
        ("web_search_options", {}),
        ("store", True),
        ("service_tier", "flex"),
        ("verbosity", "low"),
        ("moderation", {"mode": "block"}),
        ("use_beam_search", True),
        ("chat_template_kwargs", {"enable_thinking": False}),
        ("structured_outputs", {"regex": "a"}),
    ],
)
@pytest.mark.parametrize("start", [{"prompt": "a"}, {"messages": HELLO}])
def test_unsupported_fields_are_refused_by_name(start, field, value):
    with pytest.raises(BodyError, match=f"^{field} is .* which is not supported") as caught:
        translated({**start, field: value})
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ([1], "the body is a list; it must be an object"),
        ({}, "the body has neither; it needs either prompt"),
        ({"prompt": "a", "messages": HELLO}, "the body has prompt and messages"),
        ({"prompt": "a", "temprature": 1}, r"unknown field 'temprature' \(did you mean 'temperature'\?\)"),
        ({"prompt": "a", "sufix": "b"}, r"unknown field 'sufix' \(did you mean 'suffix'\?\)"),
        ({"prompt": "a", "top_logprobs": 2}, "unknown field 'top_logprobs'"),
        ({"prompt": "a", "max_completion_tokens": 2}, "unknown field 'max_completion_tokens'"),
        ({"messages": HELLO, "prompt": None, "logprobs": 2}, "unknown field 'prompt'"),
        ({"messages": HELLO, "logprobs": 2}, "logprobs is 2; it must be true or false"),
        ({"messages": HELLO, "top_logprobs": 2}, "top_logprobs is 2; it needs logprobs"),
        (
            {"messages": HELLO, "max_tokens": 2, "max_completion_tokens": 3},
            "max_tokens and max_completion_tokens differ",
        ),
        ({"prompt": "a", "n": 1.5}, "n is 1.5; it must be a whole number"),
        ({"prompt": "a", "n": True}, "n is True; it must be a whole number"),
        ({"prompt": "a", "n": 0}, r"n is 0; it must be in \[1, 128\]"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens is 0"),
        ({"prompt": "a", "temperature": "hot"}, "temperature is 'hot'; it must be a number"),
        ({"prompt": "a", "temperature": -1}, "temperature is -1"),
        ({"prompt": "a", "temperature": float("nan")}, "temperature is nan"),
        ({"prompt": "a", "logprobs": 21}, r"logprobs is 21; it must be in \[0, 20\]"),
        ({"prompt": "a", "stop": [1]}, r"stop is \[1\]; it must be text or a list"),
        ({"prompt": "a", "stop": ""}, "stop holds an empty string"),
        ({"prompt": "a", "stop_token_ids": ["1"]}, "stop_token_ids is"),
        ({"prompt": "a", "stop_token_ids": [5, -1]}, "stop_token_ids holds -1; token ids are 0 to"),
        ({"prompt": "a", "stop_token_ids": [2**31]}, f"stop_token_ids holds {2**31}"),
        ({"prompt": "a", "top_k": 2**31}, rf"top_k is {2**31}; it must be in \[-1, {2**31 - 1}\]"),
        ({"prompt": "a", "repetition_penalty": 0}, r"repetition_penalty is 0.0; it must be in \[0.001, 1000.0\]"),
        ({"prompt": "a", "repetition_penalty": 1e300}, r"repetition_penalty is 1e\+300"),
        ({"prompt": "a", "stream": "yes"}, "stream is 'yes'"),
        ({"prompt": "a", "model": 3}, "model is 3; it must be text"),
        ({"prompt": "a", "priority": "high"}, "priority is 'high'"),
        ({"prompt": []}, r"prompt is \[\]; it must be"),
        ({"prompt": [[1], []]}, "not empty"),
        ({"prompt": ["a", 1]}, r"prompt is \['a', 1\]"),
        ({"prompt": [True]}, r"prompt is \[True\]"),
        ({"prompt": 5}, "prompt is 5"),
        ({"messages": []}, r"messages is \[\]"),
        ({"messages": ["hi"]}, "message 0 is a text"),
        ({"messages": [*HELLO, {"content": "a"}]}, "message 1 has the role None"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "has the role 'tool'; roles are system"),
        ({"messages": [{"role": "user"}]}, "message 0 has content None"),
        ({"messages": [{"role": "user", "content": "a", "name": 3}]}, "message 0 has the name 3; it must be a text"),
        ({"messages": [{"role": "user", "content": "a", "tool_calls": [1]}]}, "message 0 has 'tool_calls'"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "a part of type 'image_url'"),
        ({"messages": [{"role": "user", "content": ["a"]}]}, "a part of type 'a text'"),
    ],
)
def test_bad_bodies_are_refused(body, message):
    with pytest.raises(ValueError, match=message):
        translated(body)


@pytest.mark.parametrize(
    ("body", "field", "message"),
    [
        ({"prompt": "a", "n": 0}, "n", "n is 0; it must be in [1, 128]"),
        ({"prompt": "a", "logprobs": 21}, "logprobs", "logprobs is 21; it must be in [0, 20]"),
        ({"prompt": "a", "min_tokens": 9, "max_tokens": 8}, "min_tokens", "min_tokens is 9; it must be at most"),
        ({"messages": HELLO, "max_tokens": 0}, "max_tokens", "max_tokens is 0; it must be in [1, "),
        ({"messages": HELLO, "max_completion_tokens": 0}, "max_completion_tokens", "max_completion_tokens is 0; it"),
        ({"messages": HELLO, "logprobs": True, "top_logprobs": 21}, "top_logprobs", "top_logprobs is 21; it must be"),
        ({"messages": HELLO, "stop": ["a", ""]}, "stop", "stop holds an empty string"),
    ],
)
def test_a_value_outside_its_range_is_told_by_the_name_that_the_body_has(body, field, message):
    with pytest.raises(BodyError) as caught:
        translated(body)
    assert caught.value.field == field and str(caught.value).startswith(message)
