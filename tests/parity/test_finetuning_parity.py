"""Whole finetuning jobs of the engine against the same loop in torch, and what PEFT makes of the adapters they leave.

Both begin with the same adapter, see the same rows in the same groups, and end with a file each.
"""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from flexjax.finetuning.job import FinetuneJob
from flexjax.request import SamplingParams
from flexjax.weights.adapter import fresh_adapter
from flexjax.weights.huggingface import load_directory, save_directory
from flexjax.weights.merge import merge
from flexjax.weights.peft import CONFIG_FILE, WEIGHTS_FILE, write_adapter
from tests.parity.finetuning_cases import CASES, ROWS, STEPS, groups_of
from tests.parity.tiny_pair import MODELS, VOCABULARY

RECORDED = ("loss", "grad_norm", "learning_rate")
PROMPT = np.random.default_rng(7).integers(0, VOCABULARY, 140).tolist()
LOGPROB_TOLERANCE = 5e-5
"""Of values of up to about 20: sums of three layers in float32, in another order."""

every_case = pytest.mark.parametrize("name", CASES)

@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """NAME/start, NAME/torch, NAME/flexjax: an adapter before, and after either training; NAME/merged: a model."""
    return tmp_path_factory.mktemp("finetuning")


@pytest.fixture(scope="module")
def expected(ask_reference, models, folder) -> dict[str, list[dict]]:
    """Case -> per step what torch recorded."""
    tasks = []
    for seed, (name, case) in enumerate(CASES.items()):
        start, model = folder / name / "start", models[case.model]
        if case.adapter is None:
            write_adapter(start, fresh_adapter(MODELS[case.model], base_model_name=case.model, **case.fresh))
        else:
            settings = {"settings": case.adapter, "seed": seed}
            tasks.append({"do": "write_adapter", "model": model, "output": start, **settings})
        steps = {"groups": groups_of(case.settings), "settings": case.settings}
        tasks.append({"do": "train", "model": model, "adapter": start, "output": folder / name / "torch", **steps})
    ask_reference(tasks)
    return {name: json.loads((folder / name / "torch" / "steps.json").read_text()) for name in CASES}


@pytest.fixture(scope="module")
def recorded(engines, expected, folder) -> dict[str, list[dict]]:
    """Case -> the events of its steps; the adapters are exported."""
    steps = {}
    for name, case in CASES.items():
        start = case.fresh or {"init_adapter": folder / name / "start"}
        job = FinetuneJob(name=name, data=ROWS, max_steps=STEPS, **start, **case.settings)
        handle = engines[case.model].finetune(job)
        assert handle.wait(timeout=300) == "succeeded", handle.error
        steps[name] = [event for event in handle.events() if event["type"] == "step"]
        engines[case.model].export_adapter(name, folder / name / "flexjax")
    return steps


@pytest.fixture(scope="module")
def accepted(ask_reference, recorded, engines, models, folder) -> dict[str, np.ndarray]:
    """Log-probabilities of the prompt [T, vocab]: NAME by PEFT with our adapter, NAME-merged by transformers with
    our merged model. NAME.safetensors is what PEFT merges."""
    tasks = []
    for name, case in CASES.items():
        config, base, merged = MODELS[case.model], models[case.model], folder / name / "merged"
        tree = merge(load_directory(base, config, np.float32), engines[case.model].adapter(name), config)
        save_directory(merged, config, tree)
        ask = {"do": "answer", "prompts": [PROMPT], "new_tokens": 0}
        adapted = {"model": base, "adapter": folder / name / "flexjax"}
        tasks.append({**ask, **adapted, "output": folder / f"{name}.npz"})
        tasks.append({**ask, "model": merged, "adapter": None, "output": folder / f"{name}-merged.npz"})
        tasks.append({"do": "merge", **adapted, "output": folder / f"{name}.safetensors"})
    ask_reference(tasks)
    results = [each for name in CASES for each in (name, f"{name}-merged")]
    return {each: np.load(folder / f"{each}.npz")["logprobs_0"] for each in results}


@every_case
def test_losses_gradient_norms_and_learning_rates(expected, recorded, name):
    assert len(recorded[name]) == len(expected[name]) == STEPS
    for ours, theirs in zip(recorded[name], expected[name], strict=True):
        for key in RECORDED:
            assert ours[key] == pytest.approx(theirs[key], rel=2e-5, abs=1e-12), f"step {ours['step']}: {key}"


@every_case
def test_final_adapters(recorded, folder, name):
    """Relative to how far training moved a tensor: AdamW divides by gradients, small ones with their rounding too."""
    start, theirs, ours = (load_file(folder / name / each / WEIGHTS_FILE) for each in ("start", "torch", "flexjax"))
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        moved = np.abs(tensor - start[key]).max()
        np.testing.assert_allclose(ours[key], tensor, rtol=0, atol=2e-4 * moved, err_msg=key)


@every_case
def test_written_configurations(recorded, folder, name):
    """PEFT reads a configuration and writes it; ours says the same, but claims no version of PEFT of its own."""
    theirs, ours = (json.loads((folder / name / each / CONFIG_FILE).read_text()) for each in ("torch", "flexjax"))
    assert sorted(ours.pop("target_modules")) == sorted(theirs.pop("target_modules"))
    assert ours.pop("peft_version", theirs["peft_version"]) == theirs.pop("peft_version")
    assert ours == theirs


@every_case
def test_exported_adapters_in_peft(accepted, engines, name):
    sampling = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=20)
    output = engines[CASES[name].model].generate([PROMPT], sampling, name)[0]
    assert len(output.prompt_logprobs) == len(accepted[name])
    for entry, theirs in zip(output.prompt_logprobs[1:], accepted[name], strict=False):
        for token, value in entry.items():
            assert value == pytest.approx(theirs[token], abs=LOGPROB_TOLERANCE)


@every_case
def test_merged_weights(accepted, folder, name):
    theirs, ours = load_file(folder / f"{name}.safetensors"), load_file(folder / name / "merged" / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        np.testing.assert_allclose(ours[key], tensor, rtol=1e-6, atol=1e-6, err_msg=key)


@every_case
def test_merged_models_answer_as_adapted_ones(accepted, name):
    np.testing.assert_allclose(accepted[f"{name}-merged"], accepted[name], atol=LOGPROB_TOLERANCE)
