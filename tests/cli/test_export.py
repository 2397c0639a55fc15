"""``flexjax export``: an adapter again as it was, and weights that answer as base plus adapter."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from flexjax.cli import main


@pytest.fixture
def made(work, tmp_path):
    """A PEFT directory written by hand: rank 2 on q_proj and down_proj of both layers, scale 3 / 2."""
    draw = np.random.default_rng(3).standard_normal
    sizes = {"self_attn.q_proj": (48, 32), "mlp.down_proj": (72, 48)}
    tensors = {}
    for layer in range(2):
        for module, (width, out) in sizes.items():
            name = f"base_model.model.model.layers.{layer}.{module}"
            tensors[f"{name}.lora_A.weight"] = draw((2, width)).astype(np.float32)
            tensors[f"{name}.lora_B.weight"] = draw((out, 2)).astype(np.float32)
    folder = tmp_path / "made"
    folder.mkdir()
    save(folder, tensors)
    return folder, tensors


def save(folder, tensors):
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "target_modules": ["q_proj", "down_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(settings))


def test_an_adapter_is_written_as_it_was(work, made, tmp_path):
    folder, tensors = made
    words = ["export", "--model", str(work / "tiny"), "--adapter", str(folder), "--output", str(tmp_path / "again")]
    assert main(words) == 0
    again = load_file(tmp_path / "again" / "adapter_model.safetensors")
    assert again.keys() == tensors.keys()
    assert all((again[name] == tensors[name]).all() for name in tensors)
    settings = json.loads((tmp_path / "again" / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"]) == (2, 3)


def test_merged_weights_are_the_sum(work, made, tmp_path):
    folder, tensors = made
    output = tmp_path / "merged"
    words = ["export", "--merge", "--model", str(work / "tiny"), "--adapter", str(folder), "--output", str(output)]
    assert main(words) == 0
    before, after = (load_file(each / "model.safetensors") for each in (work / "tiny", output))
    assert before.keys() == after.keys()
    for name, weight in before.items():
        key = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{key}.lora_A.weight" in tensors:
            weight = weight + 1.5 * tensors[f"{key}.lora_B.weight"] @ tensors[f"{key}.lora_A.weight"]
        np.testing.assert_allclose(after[name], weight, rtol=1e-5, atol=1e-5)
    assert json.loads((output / "config.json").read_text())["dtype"] == "float32"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (output / name).read_bytes() == (work / "tiny" / name).read_bytes()


def test_inputs_are_not_overwritten(work, made, capsys):
    folder, _ = made
    for output in (folder, work / "tiny"):
        assert main(["export", "--model", str(work / "tiny"), "--adapter", str(folder), "--output", str(output)]) == 2
        assert "which is an input too" in capsys.readouterr().err


def test_an_adapter_of_another_model_is_refused(work, made, tmp_path, capsys):
    folder, tensors = made
    save(folder, {name: array[:, :-1] for name, array in tensors.items()})
    assert (
        main(["export", "--model", str(work / "tiny"), "--adapter", str(folder), "--output", str(tmp_path / "x")]) == 2
    )
    assert "does not fit the model" in capsys.readouterr().err and not (tmp_path / "x").exists()
