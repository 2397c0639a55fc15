"""Lines in, lines out, with an engine that says what the test tells it to."""

import io
import itertools
import json
import threading
from types import SimpleNamespace

import pytest

from flexjax.request import RequestOutput
from flexjax.server.standard_input import LineServer


class Script:
    """An engine that answers token ids 1, 2, 3, ... with the letters a, b, c, ..., as many as ``max_tokens``; prompts
    of more than four tokens are too long, and those with a token 0 are answered only when ``close`` is called."""

    config = SimpleNamespace(served_model_name="smol", model="/models/smol")
    defaults = SimpleNamespace(sampling={})
    tokenizer = None

    def __init__(self):
        self.submitted, self.cancelled, self.waiting = [], [], []
        self._ids = itertools.count()

    def encode(self, prompt):
        return [ord(letter) for letter in prompt] if isinstance(prompt, str) else list(prompt)

    def submit(self, prompt, sampling, adapter, listener, priority=0):
        if len(prompt) > 4:
            raise ValueError(f"the prompt has {len(prompt)} tokens")
        if adapter not in (None, "poet"):
            raise ValueError(f"adapter {adapter!r} is not loaded")
        self.submitted.append((prompt, adapter, priority))
        for index in range(sampling.n):
            if 0 in prompt:
                self.waiting.append((listener, index))
            else:
                threading.Thread(target=self._answer, args=(listener, index, sampling)).start()
        return [next(self._ids) for _ in range(sampling.n)]

    def _answer(self, listener, index, sampling):
        for count in range(1, sampling.max_tokens + 1):
            ids = list(range(1, count + 1))
            reason = "length" if count == sampling.max_tokens else None
            logprobs = None if sampling.logprobs is None else [{i: -0.5 * i} for i in ids]
            listener.put(RequestOutput(index, [], ids, "".join(chr(96 + i) for i in ids), reason, logprobs))

    def cancel(self, ids):
        self.cancelled += ids

    def close(self):
        for listener, index in self.waiting:
            listener.put(RequestOutput(index, [], [], "", "abort"))


def served(*lines, engine=None, output=None):
    """What is written for these lines, objects or raw bytes."""
    engine, output = engine or Script(), output or io.StringIO()
    raw = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    with LineServer(output) as server:
        server.serve(engine, raw)
    return [json.loads(line) for line in output.getvalue().splitlines()]


def test_pieces_add_up_and_only_the_last_has_a_reason():
    lines = served({"id": "q", "prompt": "hi", "max_tokens": 3})
    assert lines == [
        {"id": "q", "index": 0, "token_ids": [1], "text": "a", "finish_reason": None},
        {"id": "q", "index": 0, "token_ids": [2], "text": "b", "finish_reason": None},
        {"id": "q", "index": 0, "token_ids": [3], "text": "c", "finish_reason": "length"},
    ]


def test_indices_count_prompts_and_their_samples():
    engine = Script()
    body = {"id": 1, "prompt": [[5], [6], [7]], "n": 2, "max_tokens": 1, "model": "poet", "priority": 4}
    lines = served(body, engine=engine)
    assert sorted(line["index"] for line in lines) == [0, 1, 2, 3, 4, 5]
    assert engine.submitted == [([5], "poet", 4), ([6], "poet", 4), ([7], "poet", 4)]


def test_each_piece_has_its_own_logprobs():
    lines = served({"id": 1, "prompt": "a", "max_tokens": 2, "logprobs": 0})
    assert [line["logprobs"] for line in lines] == [[{"1": -0.5}], [{"2": -1.0}]]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", "not valid JSON"),
        (b'{"id": 1, "prompt": "\xff"}', "not UTF-8"),
        (b"[" * 100_000, "nested too deeply"),
        (b"[1]", "holds a list"),
        ({"prompt": "a"}, "id is None"),
        ({"id": True, "prompt": "a"}, "id is True"),
        ({"id": "a"}, "neither"),
        ({"id": "a", "prompt": "a", "model": "ghost"}, "adapter 'ghost' is not loaded"),
        ({"id": "a", "prompt": "hello"}, "the prompt has 5 tokens"),
        ({"id": "a", "prompt": "a", "echo": True}, "echo is True"),
        ({"id": "a", "messages": [{"role": "user", "content": "a"}]}, "without a tokenizer"),
    ],
)
def test_a_bad_line_is_answered_by_its_number_and_the_next_is_served(line, message):
    good = {"id": "a", "prompt": "a", "max_tokens": 1}
    bad, *rest = sorted(served(b"\n", line, b"  ", good), key=lambda each: "id" in each)
    assert set(bad) == {"line", "error"} and bad["line"] == 2 and message in bad["error"]
    assert [each["finish_reason"] for each in rest] == ["length"]


def test_of_a_line_that_is_bad_in_part_nothing_is_answered():
    engine = Script()
    lines = served({"id": "a", "prompt": ["hi", "hello"], "n": 2, "max_tokens": 2}, engine=engine)
    assert lines == [{"line": 1, "error": "the prompt has 5 tokens"}]
    assert engine.cancelled == [0, 1]


def test_an_id_is_free_again_when_its_request_has_ended():
    engine, output, feed = Script(), io.StringIO(), threading.Event()

    def lines():
        yield b'{"id": "a", "prompt": [0]}'
        yield b'{"id": "a", "prompt": [1]}'
        engine.close()
        while '"abort"' not in output.getvalue():
            feed.wait(0.01)
        yield b'{"id": "a", "prompt": [1], "max_tokens": 1}'

    with LineServer(output) as server:
        server.serve(engine, lines())
    refused, aborted, answered = map(json.loads, output.getvalue().splitlines())
    assert refused["line"] == 2 and "id 'a' is in use" in refused["error"]
    assert aborted["finish_reason"] == "abort" and answered["finish_reason"] == "length"


def test_an_interrupt_leaves_room_for_the_last_words_of_a_closed_engine():
    engine, output = Script(), io.StringIO()

    def lines():
        yield b'{"id": "a", "prompt": [0]}'
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), LineServer(output) as server:
        try:
            server.serve(engine, lines())
        finally:
            engine.close()
    assert json.loads(output.getvalue()) == {
        "id": "a",
        "index": 0,
        "token_ids": [],
        "text": "",
        "finish_reason": "abort",
    }


def test_a_reader_that_has_gone_ends_the_service():
    class Closed(io.StringIO):
        def write(self, text):
            raise BrokenPipeError(32, "Broken pipe")

    with pytest.raises(BrokenPipeError):
        served({"id": 1, "prompt": "a", "max_tokens": 3}, output=Closed())
