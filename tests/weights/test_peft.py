"""PEFT adapters: what PEFT means by a configuration is what is read, exactly; what is not implemented is refused."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from flexjax.models.config import ModelConfig
from flexjax.models.lora import MODULES
from flexjax.weights.adapter import LoraTerm, fresh_adapter
from flexjax.weights.peft import read_adapter, write_adapter
from flexjax.weights.peft_config import terms_of

GOLDENS = Path(__file__).parents[1] / "goldens"
LLAMA = ModelConfig.from_directory(GOLDENS / "llama")
CHANGE_THE_BASE = ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga"]
ADAPTERS = ["llama/adapter", "llama/mixed_adapter", "qwen2/adapter"]


def model_of(adapter: str) -> ModelConfig:
    return ModelConfig.from_directory(GOLDENS / adapter.split("/")[0])


def adapter_config(**changes) -> dict:
    values = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
    return values | changes


def targets(**changes) -> set[str]:
    """What is adapted, as "module.layer"."""
    terms = terms_of(adapter_config(**changes), LLAMA)
    return {f"{module}.{n}" for module, layers in terms.items() for n, term in enumerate(layers) if term is not None}


@pytest.fixture
def copied(tmp_path) -> Path:
    folder = tmp_path / "adapter"
    shutil.copytree(GOLDENS / "llama" / "adapter", folder)
    return folder


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_what_is_added_to_a_kernel_is_what_peft_adds(adapter):
    """delta = (B A)ᵀ · alpha / r, with the numbers of the file."""
    read = read_adapter(GOLDENS / adapter, model_of(adapter))
    file = load_file(GOLDENS / adapter / "adapter_model.safetensors")
    alphas = {"llama/adapter": {2: 4, 4: 8, 6: 12}, "llama/mixed_adapter": {2: 3, 3: 3}, "qwen2/adapter": {3: 5}}
    prefix = "base_model.model.model.layers."
    for name in (name for name in file if name.endswith("lora_A.weight")):
        layer, _, module = name.removeprefix(prefix).split(".")[:3]
        a, b = file[name].astype(np.float64), file[name.replace("lora_A", "lora_B")].astype(np.float64)
        alpha = 1.7 if module == "down_proj" and "mixed" in adapter else alphas[adapter][len(a)]
        scale = alpha / (np.sqrt(3) if adapter == "qwen2/adapter" else len(a))
        np.testing.assert_allclose(read.delta(module, int(layer)), (b @ a).T * scale, atol=1e-6)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_unchanged_adapter_is_written_as_it_was_read(adapter, tmp_path):
    write_adapter(tmp_path, read_adapter(GOLDENS / adapter, model_of(adapter)))
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (GOLDENS / adapter, tmp_path))
    assert sorted(before) == sorted(after)
    for name, array in before.items():
        assert after[name].dtype == array.dtype
        np.testing.assert_array_equal(after[name], array)
    configs = [json.loads((folder / "adapter_config.json").read_text()) for folder in (GOLDENS / adapter, tmp_path)]
    assert configs[0] == configs[1]


def test_trained_weights_are_written_with_their_own_scale(tmp_path):
    """Twice the folded B must come back as twice the B of the file, to rounding, where ratios are not powers of two."""
    read = read_adapter(GOLDENS / "llama" / "mixed_adapter", LLAMA)
    write_adapter(tmp_path, read.with_weights({name: (a, 2 * b) for name, (a, b) in read.weights.items()}))
    before, after = (
        load_file(folder / "adapter_model.safetensors") for folder in (GOLDENS / "llama" / "mixed_adapter", tmp_path)
    )
    for name, array in before.items():
        np.testing.assert_allclose(after[name], array * (2 if "lora_B" in name else 1), rtol=3e-7)
    with pytest.raises(ValueError, match="but the adapter has"):
        read.with_weights({name: (a[:, :, :1], b) for name, (a, b) in read.weights.items()})


def test_unequal_ranks_are_padded_with_zeros():
    read = read_adapter(GOLDENS / "llama" / "adapter", LLAMA)
    assert (read.rank, read.scale, read.target_modules) == (6, 2.0, MODULES)
    a, b = read.weights["down_proj"]
    assert a.shape == (2, 40, 6) and b.shape == (2, 6, 32)
    assert not a[0, :, 4:].any() and not b[0, 4:].any() and a[1, :, 4:].all()
    mixed = read_adapter(GOLDENS / "llama" / "mixed_adapter", LLAMA)
    assert mixed.terms["v_proj"] == (None, LoraTerm(3, 3)) and not mixed.weights["v_proj"][0][0].any()


def test_new_adapter_has_the_keys_peft_writes(tmp_path):
    adapter = fresh_adapter(LLAMA, rank=4, alpha=8, target_modules=("q_proj", "o_proj"), base_model_name="somewhere")
    write_adapter(tmp_path, adapter)
    ours = json.loads((tmp_path / "adapter_config.json").read_text())
    theirs = json.loads((GOLDENS / "llama" / "adapter" / "adapter_config.json").read_text())
    theirs |= {"rank_pattern": {}, "alpha_pattern": {}, "target_modules": ["q_proj", "o_proj"]}
    theirs["base_model_name_or_path"] = "somewhere"
    del theirs["peft_version"]
    assert ours == theirs
    again = read_adapter(tmp_path, LLAMA)
    assert again.terms == adapter.terms and again.base_model_name == "somewhere"
    np.testing.assert_array_equal(again.weights["q_proj"][0], adapter.weights["q_proj"][0])
    assert not again.delta("o_proj", 1).any()


def test_fresh_adapter_is_drawn_as_peft_draws():
    a, b = fresh_adapter(LLAMA, rank=64, alpha=1).weights["down_proj"]
    assert not b.any() and np.abs(a).max() <= 40**-0.5 and abs(a.std() * np.sqrt(3 * 40) - 1) < 0.05
    other = fresh_adapter(LLAMA, rank=64, alpha=1, seed=1).weights["down_proj"][0]
    assert not np.array_equal(a, other)
    with pytest.raises(ValueError, match=r"target_modules is \['lm_head'\]"):
        fresh_adapter(LLAMA, rank=4, alpha=8, target_modules=("lm_head",))


def test_targets_as_list_expression_or_all():
    both = {"q_proj.0", "q_proj.1", "v_proj.0", "v_proj.1"}
    assert targets() == both
    assert targets(target_modules=["self_attn.q_proj", "not_there"]) == {"q_proj.0", "q_proj.1"}
    assert targets(target_modules=r".*\.(q|v)_proj") == both
    assert targets(target_modules=r"model\.layers\.1\.mlp\.(gate|up)_proj") == {"gate_proj.1", "up_proj.1"}
    assert targets(target_modules="all-linear") == {f"{module}.{layer}" for module in MODULES for layer in range(2)}
    assert targets(target_modules=["model.layers.0.mlp.up_proj"]) == {"up_proj.0"}


def test_targets_left_out():
    assert targets(exclude_modules=["v_proj"]) == {"q_proj.0", "q_proj.1"}
    assert targets(exclude_modules=r".*layers\.0\..*") == {"q_proj.1", "v_proj.1"}
    assert targets(layers_to_transform=1) == targets(layers_to_transform=[1], layers_pattern="layers")
    assert targets(layers_to_transform=[1]) == {"q_proj.1", "v_proj.1"}
    assert targets(layers_to_transform=[]) == targets()


def test_patterns_fit_the_end_of_a_name_and_the_first_one_wins():
    ranks = {r"layers\.1\.self_attn\.q_proj": 2, "q_proj": 3}
    terms = terms_of(adapter_config(rank_pattern=ranks, alpha_pattern={"v_proj": 1}), LLAMA)
    assert terms == {"q_proj": (LoraTerm(3, 8), LoraTerm(2, 8)), "v_proj": (LoraTerm(4, 1), LoraTerm(4, 1))}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"task_type": "SEQ_CLS"}, "task_type is 'SEQ_CLS'"),
        ({"bias": "lora_only"}, "bias is 'lora_only'"),
        ({"lora_bias": True}, "lora_bias is True"),
        ({"use_dora": True}, "use_dora is True"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out is True"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is ['lm_head']"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices is [1]"),
        ({"target_parameters": ["experts.w"]}, "target_parameters is ['experts.w']"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication is [[0, 2], [1, 2]]"),
        ({"alora_invocation_tokens": [5, 6]}, "alora_invocation_tokens is [5, 6]"),
        ({"use_qalora": True}, "use_qalora is True"),
        ({"qalora_group_size": 8}, "qalora_group_size is 8"),
        ({"use_bdlora": {"nblocks": 2}}, "use_bdlora is {'nblocks': 2}"),
        ({"loftq_config": {"loftq_bits": 4}}, "loftq_config is {'loftq_bits': 4}"),
        ({"megatron_config": {"tp": 2}}, "megatron_config is {'tp': 2}"),
        ({"ensure_weight_tying": True}, "ensure_weight_tying is True"),
        ({"of_a_later_peft": 3}, "of_a_later_peft is 3"),
        *(({"init_lora_weights": name}, f"init_lora_weights is '{name}'") for name in CHANGE_THE_BASE),
        ({"target_modules": None}, "target_modules is None"),
        ({"target_modules": ["c_attn"]}, "matches no module of this model"),
        ({"target_modules": ["q_proj", "lm_head"]}, "matches lm_head; only q_proj"),
        ({"target_modules": ["embed_tokens"]}, "matches model.embed_tokens"),
        ({"target_modules": ".*mlp.*"}, "matches model.layers.0.mlp,"),
        ({"target_modules": "("}, "which is no regular expression"),
        ({"target_modules": ".*q_proj", "layers_to_transform": [0]}, "layers_to_transform and layers_pattern need"),
        ({"r": 0}, "r is 0; a rank must be"),
        ({"rank_pattern": {"q_proj": 1.5}}, "rank_pattern['q_proj'] is 1.5"),
        ({"lora_alpha": "16"}, "lora_alpha is '16'"),
    ],
)
def test_refused_by_name_and_value(changes, words):
    with pytest.raises(ValueError, match=".*") as caught:
        targets(**changes)
    assert words in str(caught.value)


def test_every_refusal_in_one_message():
    with pytest.raises(ValueError, match=r"use_dora is True .*; modules_to_save is \['lm_head'\]"):
        targets(use_dora=True, modules_to_save=["lm_head"])


def test_what_says_nothing_about_the_mathematics_is_accepted():
    harmless = {"init_lora_weights": "gaussian", "eva_config": {"rho": 2}, "of_a_later_peft": None, "peft_version": "9"}
    assert targets(**harmless) == targets()


def test_adapter_of_another_model():
    other = ModelConfig.from_directory(GOLDENS / "qwen2")
    with pytest.raises(ValueError, match="trained on 'goldens/llama', does not fit the model") as caught:
        read_adapter(GOLDENS / "llama" / "adapter", other)
    assert "layers.0.self_attn.q_proj.lora_A.weight has shape [4, 32], expected [4, 24]" in str(caught.value)


def test_all_wrong_tensors_in_one_message(copied):
    file = load_file(copied / "adapter_model.safetensors")
    prefix = "base_model.model.model.layers.0.self_attn"
    del file[f"{prefix}.v_proj.lora_B.weight"]
    file[f"{prefix}.q_proj.lora_A.weight"] = np.zeros((3, 32), np.float32)
    file["base_model.model.lm_head.weight"] = np.zeros((48, 32), np.float32)
    save_file(file, copied / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"3 faults") as caught:
        read_adapter(copied, LLAMA)
    for words in (f"missing {prefix}.v_proj.lora_B", "unexpected base_model.model.lm_head", "[3, 32], expected [4, "):
        assert words in str(caught.value)


def test_broken_files_are_named(copied):
    file = copied / "adapter_model.safetensors"
    whole = load_file(file)
    save_file(whole | {name: array * np.nan for name, array in list(whole.items())[:1]}, file)
    with pytest.raises(ValueError, match="holds NaN or infinity"):
        read_adapter(copied, LLAMA)
    file.write_bytes(file.read_bytes()[:-7])
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors \(\d+ bytes\) is truncated"):
        read_adapter(copied, LLAMA)
    file.rename(copied / "adapter_model.bin")
    with pytest.raises(FileNotFoundError, match="pickled torch weights are not read"):
        read_adapter(copied, LLAMA)
    (copied / "adapter_config.json").write_text("{,}")
    with pytest.raises(ValueError, match=r"adapter_config\.json is not valid JSON"):
        read_adapter(copied, LLAMA)
    (copied / "adapter_config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no adapter_config\.json in"):
        read_adapter(copied, LLAMA)
