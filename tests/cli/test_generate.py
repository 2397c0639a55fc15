"""``flexjax generate``: the dense model's greedy texts, of the base and of an adapter."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from flexjax.cli import main
from flexjax.cli.adapters import load_adapters
from flexjax.cli.generate import enough_for, write_text
from flexjax.config import EngineConfig
from flexjax.fields import ConfigError
from flexjax.request import RequestOutput
from flexjax.weights.peft import read_adapter
from tests.ladder import Model
from tests.tiny_model import CONFIG

PROMPTS = ["1 and 2 make", "3 and 0 make"]


def dense_continuation(prompt: list[int], count: int, adapter=None) -> list[int]:
    """Greedy tokens of the whole-sequence reference in float64."""
    model, tokens = Model.random(CONFIG).dense, list(prompt)
    factors = None
    if adapter is not None:
        factors = {
            "a": {n: a for n, (a, _) in adapter.weights.items()},
            "b": {n: b for n, (_, b) in adapter.weights.items()},
        }
    for _ in range(count):
        logits = model.logits(np.array(tokens), factors, 2.0)[-1]
        tokens.append(int(logits.argmax()))
    return tokens[len(prompt) :]


def test_the_adapter_answers_when_it_is_asked_for(work, adapter, capsys):
    loaded = read_adapter(adapter, CONFIG)
    words = ["generate", str(work / "server.toml"), "--adapter", f"counter={adapter}", "--use", "counter", "--json"]
    words += ["--prompt", PROMPTS[0], "--prompt", PROMPTS[1], "--max-tokens", "12", "--temperature", "0"]
    capsys.readouterr()
    assert main(words) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["prompt"] for line in lines] == PROMPTS and [line["index"] for line in lines] == [0, 1]
    for line, prompt in zip(lines, PROMPTS, strict=True):
        assert line["token_ids"] == dense_continuation(encode(work, prompt), 12, loaded)
        assert line["text"].isascii() and line["finish_reason"] == "length"


def encode(work, text: str) -> list[int]:
    """One id per byte, by the table in the model's tokenizer.json (a space is written Ġ there)."""
    table = json.loads((work / "tiny" / "tokenizer.json").read_text())["model"]["vocab"]
    return [table[letter.replace(" ", "Ġ")] for letter in text]


@pytest.mark.parametrize(
    ("platform", "sequences", "given", "policy", "row_sizes"),
    [
        ("gpu", 1, {}, "inference_only", (32,)),
        ("gpu", 40, {}, "inference_only", (32, 64)),
        ("gpu", 1000, {}, "inference_only", (32, 64, 128, 256)),
        ("cpu", 1, {}, "inference_only", (2,)),
        ("cpu", 3, {}, "inference_only", (2, 8)),
        ("gpu", 1, {"max_rows": 64}, "inference_only", (32, 64)),
        ("gpu", 1, {"row_sizes": (8, 16), "policy": "price"}, "price", (8, 16)),
        ("gpu", 1, {"tpot_objective_ms": 30}, "co_serve", (32,)),
    ],
)
def test_an_engine_is_no_larger_than_its_prompts_need(platform, sequences, given, policy, row_sizes):
    config = enough_for(EngineConfig(model="m", **given), sequences, platform).resolved(64, platform)
    assert (config.policy, config.row_sizes) == (policy, row_sizes)


def test_several_answers_have_headings(capsys):
    outputs = [RequestOutput(i % 2, [], text=text) for i, text in enumerate(["A", "B", "C", "D"])]
    write_text(["x", "y"], 2, outputs)
    assert capsys.readouterr().out == "=== x (1 of 2)\nA\n=== x (2 of 2)\nB\n=== y (1 of 2)\nC\n=== y (2 of 2)\nD\n"
    write_text(["x"], 1, outputs[:1])
    assert capsys.readouterr().out == "A\n"


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["poet", "tiny"], "takes the name 'tiny', which is the base model's"),
        (["/models/tiny"], "takes the name '/models/tiny', which is the base model's"),
        (["poet", "poet"], "takes the name 'poet' 2 times"),
    ],
)
def test_names_of_adapters_are_their_own(names, message):
    """The engine would have no method to load one with."""
    engine = SimpleNamespace(config=SimpleNamespace(served_model_name="tiny", model="/models/tiny"))
    with pytest.raises(ConfigError, match=message):
        load_adapters(engine, [(name, Path("x")) for name in names])


def test_the_demo_is_called_with_its_arguments(monkeypatch):
    calls = []
    monkeypatch.setattr("flexjax.cli.demo.run_demo", lambda *given: calls.append(given) or 3)
    assert main(["demo", "some.toml", "--short", "--output", "out"]) == 3
    assert [tuple(map(str, call)) for call in calls] == [("some.toml", "True", "out")]
    assert "flexjax.cli.demo" in sys.modules
