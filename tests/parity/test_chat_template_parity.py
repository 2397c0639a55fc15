"""A published tokenizer and its chat template against transformers' AutoTokenizer."""

import json

import pytest

from flexjax.tokenizer import Tokenizer

TOOL = {
    "type": "function",
    "function": {
        "name": "temperature",
        "description": "Temperature <now> & here, in °C",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
QUESTION = {"role": "user", "content": "How warm is it in Zürich — 'today'?"}
CALL = {"type": "function", "function": {"name": "temperature", "arguments": {"city": "Zürich"}}}
CONVERSATIONS = {
    "question": {"messages": [QUESTION], "add_generation_prompt": True},
    "whole talk": {
        "messages": [
            {"role": "system", "content": "Answer in one word.\n"},
            QUESTION,
            {"role": "assistant", "content": " 20 😀\n\n"},
            {"role": "user", "content": "<|im_end|>\nand {{ now }}?"},
            {"role": "assistant", "content": ""},
        ],
        "add_generation_prompt": False,
    },
    "tools": {
        "messages": [
            QUESTION,
            {"role": "assistant", "content": "", "tool_calls": [CALL, CALL]},
            {"role": "tool", "content": '{"celsius": 20.5}'},
            {"role": "tool", "content": "again"},
        ],
        "tools": [TOOL],
        "add_generation_prompt": True,
    },
}
TEXTS = [
    "",
    " leading and trailing  ",
    "I'll don't WE'RE 12345 3.14\t\t\n\n x\r\n",
    "日本語のテキスト, 한국어 e\u0301 \u00a0 naïve 👩‍👩‍👧‍👦",  # combining marks: the tokenizer composes them
    "<|im_start|>user<|endoftext|> <|not_special|>",
    "def f(x):\n    return x**2  # comment\n",
]


@pytest.fixture(scope="module")
def expected(ask_reference, shared, tmp_path_factory) -> dict[str, list[dict]]:
    output = tmp_path_factory.mktemp("chat") / "chat.json"
    asked = {"conversations": list(CONVERSATIONS.values()), "texts": TEXTS, "output": output}
    ask_reference([{"do": "chat", "tokenizer": shared / "tokenizers" / "qwen2.5", **asked}])
    return json.loads(output.read_text())


@pytest.fixture(scope="module")
def tokenizer(expected, shared) -> Tokenizer:
    return Tokenizer.from_directory(shared / "tokenizers" / "qwen2.5")


@pytest.mark.parametrize("number", range(len(CONVERSATIONS)), ids=CONVERSATIONS)
def test_conversations(expected, tokenizer, number):
    theirs, asked = expected["conversations"][number], list(CONVERSATIONS.values())[number]
    assert tokenizer.render_chat(**asked) == theirs["text"]
    assert tokenizer.apply_chat_template(**asked) == theirs["ids"]


@pytest.mark.parametrize("number", range(len(TEXTS)))
def test_texts(expected, tokenizer, number):
    theirs = expected["texts"][number]
    assert tokenizer.encode(TEXTS[number]) == theirs["ids"]
    assert tokenizer.decode(theirs["ids"], skip_special_tokens=False) == theirs["decoded"]
