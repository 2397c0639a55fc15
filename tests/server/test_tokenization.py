"""/tokenize and /detokenize, as vLLM has them; the model's tokens are the bytes of a text."""

import httpx
import pytest


def post(server, path: str, **body) -> httpx.Response:
    return httpx.post(f"{server.url}{path}", json=body, timeout=30)


def test_a_text_becomes_tokens_and_a_text_again(server, engine):
    answer = post(server, "/tokenize", model="tiny", prompt="naïve", return_token_strs=True).json()
    assert answer["count"] == len("naïve".encode()) == 6 and answer["max_model_len"] == 256
    assert answer["tokens"] == engine.tokenizer.encode("naïve")
    assert answer["token_strs"] == ["n", "a", "\N{REPLACEMENT CHARACTER}", "\N{REPLACEMENT CHARACTER}", "v", "e"]
    assert post(server, "/detokenize", tokens=answer["tokens"]).json() == {"prompt": "naïve"}


@pytest.mark.parametrize(("generation", "end"), [(True, [258]), (False, [])])
def test_a_conversation_becomes_tokens(server, engine, generation, end):
    messages = [{"role": "user", "content": "hi"}]
    answer = post(server, "/tokenize", messages=messages, add_generation_prompt=generation).json()
    assert answer["tokens"] == [257, *engine.tokenizer.encode("hi"), 256, *end]  # <user>hi<end><assistant>
    assert answer["token_strs"] is None


def test_special_tokens_are_shown(server):
    assert post(server, "/detokenize", tokens=[257, 256]).json() == {"prompt": "<user><end>"}


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("/tokenize", {}, 400, None),
        ("/tokenize", {"prompt": 5}, 400, "prompt"),
        ("/tokenize", {"prompt": "a", "promt": "b"}, 400, "promt"),
        ("/tokenize", {"prompt": "a", "model": "ghost"}, 404, "model"),
        ("/tokenize", {"messages": [{"role": "king"}]}, 400, "messages"),
        ("/detokenize", {}, 400, "tokens"),
        ("/detokenize", {"tokens": [259]}, 400, "tokens"),
        ("/detokenize", {"tokens": [-1]}, 400, "tokens"),
        ("/detokenize", {"tokens": ["a"]}, 400, "tokens"),
    ],
)
def test_mistakes_are_named(server, path, body, status, param):
    answer = post(server, path, **body)
    assert answer.status_code == status and answer.json()["error"]["param"] == param
