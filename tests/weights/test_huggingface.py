"""Hugging Face directories: arrays land where they belong, and everything wrong with one is said at once."""

import json
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from flexjax.models.config import ModelConfig
from flexjax.weights import huggingface
from flexjax.weights.huggingface import load_directory, save_directory

GOLDENS = Path(__file__).parents[1] / "goldens"


@pytest.fixture
def llama(tmp_path) -> Path:
    folder = tmp_path / "llama"
    shutil.copytree(GOLDENS / "llama", folder)
    return folder


def load(folder: Path, dtype=np.float32, tp: int = 1) -> dict[str, np.ndarray]:
    return load_directory(folder, ModelConfig.from_directory(folder), dtype, tp)


def test_arrays_of_a_real_file_stand_in_their_place():
    tree, file = load(GOLDENS / "llama"), load_file(GOLDENS / "llama" / "model.safetensors")
    attention = "model.layers.1.self_attn"
    qkv = np.concatenate([file[f"{attention}.{name}_proj.weight"] for name in "qkv"])
    np.testing.assert_array_equal(tree["layers.qkv"][1], qkv)
    np.testing.assert_array_equal(tree["layers.post_norm"][0], file["model.layers.0.post_attention_layernorm.weight"])
    np.testing.assert_array_equal(tree["head"], file["lm_head.weight"])
    assert sum(array.size for array in tree.values()) == sum(array.size for array in file.values())


def test_bfloat16_on_request():
    tree, file = load(GOLDENS / "qwen2", ml_dtypes.bfloat16), load_file(GOLDENS / "qwen2" / "model.safetensors")
    expected = file["model.embed_tokens.weight"].astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(tree["embed"], expected)
    assert {array.dtype for array in tree.values()} == {np.dtype(ml_dtypes.bfloat16)}
    assert "head" not in tree and "layers.qkv_bias" in tree


def test_several_files_with_an_index(llama):
    file, whole = load_file(llama / "model.safetensors"), load(llama)
    names = sorted(file)
    halves = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for half, its_names in halves.items():
        save_file({name: file[name] for name in its_names}, llama / half)
    homes = {name: half for half, its_names in halves.items() for name in its_names}
    (llama / "model.safetensors.index.json").write_text(json.dumps({"weight_map": homes}))
    (llama / "model.safetensors").unlink()
    for name, array in load(llama).items():
        np.testing.assert_array_equal(array, whole[name])
    (llama / "b.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"names files that are not there: b\.safetensors"):
        load(llama)


def test_all_differences_in_one_message(llama):
    file = load_file(llama / "model.safetensors")
    del file["model.norm.weight"], file["model.layers.0.mlp.up_proj.weight"]
    file["model.layers.2.mlp.up_proj.weight"] = np.zeros((40, 32), np.float32)
    file["lm_head.weight"] = np.zeros((50, 32), np.float32)
    save_file(file, llama / "model.safetensors")
    with pytest.raises(ValueError, match="4 faults") as caught:
        load(llama)
    for words in (
        "missing model.norm.weight [32]",
        "missing model.layers.0.mlp.up_proj.weight [40, 32]",
        "unexpected model.layers.2.mlp.up_proj.weight [40, 32]",
        "lm_head.weight has shape [50, 32], expected [48, 32]",
    ):
        assert words in str(caught.value)


def test_what_can_be_derived_is_not_unexpected(tmp_path):
    shutil.copytree(GOLDENS / "qwen2", tmp_path / "qwen2")
    file = load_file(tmp_path / "qwen2" / "model.safetensors")
    file["lm_head.weight"] = file["model.embed_tokens.weight"]
    file["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(4, np.float32)
    save_file(file, tmp_path / "qwen2" / "model.safetensors")
    assert "head" not in load(tmp_path / "qwen2")


@pytest.mark.parametrize("length", [0, 5, 1000, -1])
def test_truncated_file_is_named(llama, length):
    file = llama / "model.safetensors"
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(ValueError, match=r"model\.safetensors \(\d+ bytes\) is truncated"):
        load(llama)


def test_quantised_arrays_are_refused(llama):
    file = load_file(llama / "model.safetensors")
    file["model.norm.weight"] = np.zeros(32, np.int8)
    save_file(file, llama / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.norm\.weight .* has dtype I8; supported are"):
        load(llama)


def test_pickled_weights_are_not_read(llama):
    (llama / "model.safetensors").rename(llama / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"it has pytorch_model\.bin, but pickled torch weights are not read"):
        load(llama)


@pytest.mark.parametrize("model", ["llama", "qwen2"])
@pytest.mark.parametrize("tp", [1, 2])
def test_saved_directory_has_the_arrays_it_was_loaded_from(model, tp, tmp_path, monkeypatch):
    config = ModelConfig.from_directory(GOLDENS / model)
    tp = tp if config.num_kv_heads % tp == 0 else 1
    monkeypatch.setattr(huggingface, "SHARD_BYTES", 20_000)  # forces several files
    save_directory(tmp_path, config, load(GOLDENS / model, tp=tp), tp)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 1 and not list(tmp_path.glob("*.unfinished"))
    saved = {name: array for file in files for name, array in load_file(file).items()}
    original = load_file(GOLDENS / model / "model.safetensors")
    assert sorted(saved) == sorted(original)
    for name, array in original.items():
        np.testing.assert_array_equal(saved[name], array)
    assert ModelConfig.from_directory(tmp_path) == config
    assert load(tmp_path)["layers.qkv"].shape == load(GOLDENS / model)["layers.qkv"].shape
