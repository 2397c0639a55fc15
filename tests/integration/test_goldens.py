"""Our logits, gradients and AdamW steps = those of transformers, PEFT and torch, recorded in files.

tests/goldens holds two random tiny models (`scripts/make_goldens.py` describes and makes the files); the shared folder
a real one of 260 thousand weights, with an adapter trained for ten steps.
"""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from flexjax.finetuning.packing import pack_group
from flexjax.layout import SlotLayout
from flexjax.steps.update import OptimizerSpec
from flexjax.tokenizer import Tokenizer
from flexjax.weights.peft import read_adapter, tensor_name
from tests.ladder import MICROBATCH, ROWS, WIDE, Model, Rig, assert_close, assert_likeliest, example

GOLDENS = Path(__file__).parents[1] / "goldens"
LAYOUT = SlotLayout(ROWS, 256, tape=True, logprobs=True, prompt_logprobs=True)
TOLERANCE = 1e-4
"""Both sides compute in float32, with sums in different orders."""


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=-1, keepdims=True).astype(np.float64)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def factors_of(adapter) -> dict:
    """{"a": module -> [layers, in, r], "b": module -> [layers, r, out]} of an adapter that was read from files."""
    pairs = adapter.weights.items()
    return {"a": {name: a for name, (a, _) in pairs}, "b": {name: b for name, (_, b) in pairs}}


def assert_tensors_close(adapter, got: dict, tensors: dict[str, np.ndarray], tolerance: float) -> None:
    """What we computed for the factors of an adapter against PEFT's tensors of any rank, A [r, in] and B [out, r]; what
    lies beyond a tensor's rank must be zero."""
    for module, terms in adapter.terms.items():
        for layer, term in enumerate(terms):
            a, b = got["a"][module][layer].T, got["b"][module][layer].T
            expected = {factor: tensors[tensor_name(layer, module, factor)] for factor in "AB"}
            assert_close(a[: term.rank], expected["A"], tolerance, f"A of {module} in layer {layer}")
            assert_close(b[:, : term.rank], expected["B"], tolerance, f"B of {module} in layer {layer}")
            assert not a[term.rank :].any() and not b[:, term.rank :].any(), f"padding of {module} in layer {layer}"


def assert_prompt(rig: Rig, number: int, tokens, adapter, logits: np.ndarray) -> None:
    """The model's log-probabilities at every position of a prompt."""
    rig.seat(number, row=number % ROWS, tokens=tokens, adapter=adapter)
    output = rig.step(LAYOUT, prompts=[(number, 0, len(tokens))])
    _, ids, values = (part[: len(tokens)] for part in output.prompt_logprobs)
    assert_likeliest(ids, values, log_softmax(logits), TOLERANCE)


def train_step(rig: Rig, learning_rate: float) -> tuple[float, dict, float]:
    """Loss, gradients and their norm in one optimizer step on microbatch 0."""
    rig.step(LAYOUT, windows=rig.whole_windows(0))
    loss = rig.loss(0)
    rig.backward(0)
    return loss, rig.factor_gradients(), rig.update(learning_rate)


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def tiny(request) -> tuple[Path, Rig, dict]:
    """(folder, rig, arrays) of a recorded model."""
    folder = GOLDENS / request.param
    return folder, Rig(Model.from_directory(folder), tape=WIDE), dict(np.load(folder / "golden.npz"))


def test_logits(tiny):
    _, rig, golden = tiny
    for number in range(2):
        assert_prompt(rig, number, golden[f"tokens_{number}"], rig.table.find(None), golden[f"logits_{number}"])


def test_logits_under_adapters(tiny):
    """Ranks and scales that differ between modules and layers, layers without an adapter, rank-stabilised scales."""
    folder, rig, golden = tiny
    for directory in sorted(folder.glob("*adapter")):
        adapter = read_adapter(directory, rig.dims.model)
        version = rig.load(directory.name, factors_of(adapter), adapter.scale)
        kind = f"{directory.name.removesuffix('_adapter')}_logits_"
        for number in [number for number in range(2) if f"{kind}{number}" in golden]:
            assert_prompt(rig, number, golden[f"tokens_{number}"], version, golden[f"{kind}{number}"])


def test_training(tiny):
    """Loss, gradient and gradient norm of the first step, the others' losses and norms, and the adapter at the end."""
    folder, rig, golden = tiny
    adapter = read_adapter(folder / "adapter", rig.dims.model)
    record, tensors = json.loads((folder / "training.json").read_text()), load_file(folder / "training.safetensors")
    spec = OptimizerSpec("adamw", record["weight_decay"], record["max_grad_norm"])
    rig.begin(factors_of(adapter), adapter.scale, spec=spec)
    group = [example(golden[f"tokens_{n}"], golden[f"loss_mask_{n}"]) for n in range(2)]
    rig.hold(0, *pack_group(group, MICROBATCH, 0, 0))
    steps = [train_step(rig, record["learning_rate"]) for _ in range(record["steps"])]
    assert [loss for loss, _, _ in steps] == pytest.approx(record["losses"], rel=1e-5)
    assert [norm for _, _, norm in steps] == pytest.approx(record["gradient_norms"], rel=1e-4)
    assert_tensors_close(adapter, steps[0][1], behind("gradient.", tensors), TOLERANCE)
    assert_tensors_close(adapter, {"a": rig.master.a, "b": rig.master.b}, behind("trained.", tensors), TOLERANCE)
    rig.step(LAYOUT, windows=rig.whole_windows(0))
    assert rig.loss(0) == pytest.approx(record["loss_after"], rel=1e-4)


def behind(prefix: str, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


@pytest.fixture(scope="module")
def stories(shared) -> tuple[Path, Rig]:
    folder = shared / "models" / "stories260k"
    return folder, Rig(Model.from_directory(folder), tape=WIDE)


def test_stories_logits(stories):
    folder, rig = stories
    golden = json.loads((folder / "golden.json").read_text())
    logits = np.load(folder / "golden_logits.npz")["logits"]
    assert_prompt(rig, 0, golden["ids"], rig.table.find(None), logits)


def test_stories_greedy_text(stories):
    folder, rig = stories
    golden = json.loads((folder / "golden.json").read_text())
    count = len(golden["greedy_from_bos"])
    rig.seat(1, row=3, tokens=[1], room=count)
    rig.step(LAYOUT, prompts=[(1, 0, 1)])
    for _ in range(count - 1):
        rig.step(SlotLayout(ROWS), decode=(1,))
    output = rig.serving[1].tokens[1:]
    assert output == golden["greedy_from_bos"]
    assert Tokenizer.from_directory(folder).decode(output).strip() == golden["greedy_text"].strip()


def test_stories_training(stories, shared):
    """Ten AdamW steps without clipping on two sequences of unequal length."""
    _, rig = stories
    folder = shared / "goldens" / "stories260k-train"
    golden = json.loads((folder / "golden.json").read_text())
    adapter = read_adapter(folder / "init", rig.dims.model)
    rig.begin(factors_of(adapter), adapter.scale)
    group = []
    for tokens, labels in zip(golden["input_ids"], golden["labels"], strict=True):
        trained = np.array(labels) != -100
        group.append(example(tokens, trained & (np.arange(len(tokens)) > 0)))
    rig.hold(0, *pack_group(group, MICROBATCH, 0, 0))
    steps = [train_step(rig, 1e-2) for _ in range(10)]
    assert [loss for loss, _, _ in steps] == pytest.approx(golden["losses"], rel=1e-4)
    assert_tensors_close(adapter, steps[0][1], load_file(folder / "grads_step0.safetensors"), TOLERANCE)
    final = load_file(folder / "after10" / "adapter_model.safetensors")
    assert_tensors_close(adapter, {"a": rig.master.a, "b": rig.master.b}, final, 1e-3)
