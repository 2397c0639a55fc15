"""Makes tests/goldens: what transformers, PEFT and torch compute for two random tiny models, for tests to compare with.

    python scripts/make_goldens.py [FOLDER]          (needs torch, transformers and peft; takes seconds)

Per model, FOLDER/llama (llama3 rotary scaling, grouped queries, untied) and FOLDER/qwen2 (q/k/v bias, tied):

    config.json, model.safetensors      the model, float32, as transformers saves it
    adapter/                            a LoRA adapter as PEFT saves it, A and B both random. llama: rank_pattern and
                                        alpha_pattern with one scale for all modules; qwen2: use_rslora, four modules
    mixed_adapter/                      llama only: alpha_pattern with unequal scales, layers_to_transform
    golden.npz                          (n = 0, 1 numbers two sequences of different length)
        tokens_n          [T] int32     token ids
        loss_mask_n       [T] int8      1 where the token is a target, predicted from those before it; never at 0
        logits_n          [T, vocab]    float32, of the base model
        adapter_logits_n  [T, vocab]    float32, under adapter/
        mixed_logits_0    [T, vocab]    float32, under mixed_adapter/ (llama only)
    training.safetensors                names are those of adapter_model.safetensors behind a prefix:
        gradient.NAME                   of the loss with respect to adapter/, before clipping
        trained.NAME                    adapter/ after the last step
    training.json                       hyperparameters, and per step the loss and the gradient norm before clipping

The loss is the sum of the cross entropies of all targets of both sequences divided by their number; the sequences do
not see each other. Every step is torch.nn.utils.clip_grad_norm_ then torch.optim.AdamW on the same two sequences.
"""

import json
import sys
import warnings
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

VOCABULARY = 48
LENGTHS = (67, 29)
TRAINING = {"steps": 3, "learning_rate": 0.01, "weight_decay": 0.1, "max_grad_norm": 0.5,
            "beta1": 0.9, "beta2": 0.999, "epsilon": 1e-8}  # fmt: skip
ALL_MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

LLAMA = LlamaConfig(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=256,
    tie_word_embeddings=False,
    rope_parameters={
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    initializer_range=0.2,
)
QWEN2 = Qwen2Config(
    vocab_size=VOCABULARY,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=3,
    num_key_value_heads=1,
    max_position_embeddings=256,
    tie_word_embeddings=True,
    rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    initializer_range=0.2,
)
ADAPTERS = {
    "llama": LoraConfig(
        task_type="CAUSAL_LM",
        r=4,
        lora_alpha=8,
        target_modules=ALL_MODULES,
        rank_pattern={"k_proj": 2, "layers.1.mlp.down_proj": 6},
        alpha_pattern={"k_proj": 4, "layers.1.mlp.down_proj": 12},
    ),
    "qwen2": LoraConfig(
        task_type="CAUSAL_LM",
        r=3,
        lora_alpha=5,
        use_rslora=True,
        target_modules=["q_proj", "v_proj", "o_proj", "up_proj"],
    ),
}
MIXED = LoraConfig(
    task_type="CAUSAL_LM",
    r=2,
    lora_alpha=3,
    target_modules=["q_proj", "v_proj", "down_proj"],
    layers_to_transform=[1],
    rank_pattern={"v_proj": 3},
    alpha_pattern={"down_proj": 1.7},
)


def make_model(folder: Path, config) -> torch.nn.Module:
    """A random model, biases and norms included, saved in a folder."""
    model = {"llama": LlamaForCausalLM, "qwen2": Qwen2ForCausalLM}[config.model_type](config).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.uniform_(0.5, 1.5)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.5)
    model.save_pretrained(folder)
    return model


def load_model(folder: Path) -> torch.nn.Module:
    """The saved model, with the plainest attention there is."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def make_sequences() -> dict[str, np.ndarray]:
    """Two random sequences; the targets are spans, as an assistant's turns are."""
    sequences = {}
    for number, length in enumerate(LENGTHS):
        sequences[f"tokens_{number}"] = torch.randint(0, VOCABULARY, (length,)).numpy().astype(np.int32)
        mask = np.zeros(length, np.int8)
        mask[length // 4 : length // 2] = mask[-length // 5 :] = 1
        sequences[f"loss_mask_{number}"] = mask
    return sequences


def logits_of(model: torch.nn.Module, tokens: np.ndarray) -> torch.Tensor:
    return model(torch.tensor(tokens, dtype=torch.long)[None]).logits[0]


def loss_of(model: torch.nn.Module, sequences: dict[str, np.ndarray]) -> torch.Tensor:
    """Mean cross entropy over the targets of both sequences."""
    total, count = 0.0, 0
    for number in range(len(LENGTHS)):
        tokens, mask = sequences[f"tokens_{number}"], torch.tensor(sequences[f"loss_mask_{number}"][1:].astype(bool))
        predicted, targets = logits_of(model, tokens)[:-1][mask], torch.tensor(tokens[1:], dtype=torch.long)[mask]
        total = total + torch.nn.functional.cross_entropy(predicted, targets, reduction="sum")
        count += len(targets)
    return total / count


def make_adapter(folder: Path, model_folder: Path, config: LoraConfig) -> None:
    """A random adapter, saved as PEFT saves it; name of the base model and order of targets are the same everywhere."""
    model = get_peft_model(load_model(model_folder), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    saved = model.peft_config["default"]
    saved.base_model_name_or_path = f"goldens/{model_folder.name}"
    saved.target_modules = sorted(saved.target_modules)  # a set otherwise, written in any order
    model.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)


def load_adapter(folder: Path, model_folder: Path, trainable: bool = False) -> torch.nn.Module:
    return PeftModel.from_pretrained(load_model(model_folder), folder, is_trainable=trainable).eval()


def train(folder: Path, sequences: dict[str, np.ndarray]) -> None:
    """A few AdamW steps on the adapter, recorded."""
    model = load_adapter(folder / "adapter", folder, trainable=True)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters,
        lr=TRAINING["learning_rate"],
        betas=(TRAINING["beta1"], TRAINING["beta2"]),
        eps=TRAINING["epsilon"],
        weight_decay=TRAINING["weight_decay"],
    )
    record, arrays = TRAINING | {"losses": [], "gradient_norms": []}, {}
    for _ in range(TRAINING["steps"]):
        optimizer.zero_grad()
        loss = loss_of(model, sequences)
        loss.backward()
        if not arrays:
            trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
            arrays = {f"gradient.{saved_name(name)}": parameter.grad.clone() for name, parameter in trained}
        norm = torch.nn.utils.clip_grad_norm_(parameters, TRAINING["max_grad_norm"])
        optimizer.step()
        record["losses"].append(loss.item())
        record["gradient_norms"].append(norm.item())
    record["loss_after"] = loss_of(model, sequences).item()
    arrays |= {f"trained.{name}": value.contiguous() for name, value in get_peft_model_state_dict(model).items()}
    save_file(arrays, folder / "training.safetensors")
    (folder / "training.json").write_text(json.dumps(record, indent=2) + "\n")


def saved_name(name: str) -> str:
    """Name of a parameter in a PEFT file: without the adapter's name."""
    return name.replace(".default.", ".")


def make_goldens(folder: Path, config) -> None:
    torch.manual_seed(20)
    folder.mkdir(parents=True, exist_ok=True)
    make_model(folder, config)
    make_adapter(folder / "adapter", folder, ADAPTERS[folder.name])
    golden = make_sequences()
    sequences = dict(golden)
    models = {"logits_{}": load_model(folder), "adapter_logits_{}": load_adapter(folder / "adapter", folder)}
    with torch.no_grad():
        for name, model in models.items():
            for number in range(len(LENGTHS)):
                golden[name.format(number)] = logits_of(model, sequences[f"tokens_{number}"]).numpy()
        if folder.name == "llama":
            make_adapter(folder / "mixed_adapter", folder, MIXED)
            mixed = load_adapter(folder / "mixed_adapter", folder)
            golden["mixed_logits_0"] = logits_of(mixed, sequences["tokens_0"]).numpy()
    np.savez_compressed(folder / "golden.npz", **golden)
    train(folder, sequences)


def main(folder: Path) -> None:
    warnings.filterwarnings("ignore", message="Could not find a config file")
    torch.set_num_threads(1)  # the order of sums, and so the last bits, must not depend on the machine
    for config in (LLAMA, QWEN2):
        make_goldens(folder / config.model_type, config)
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    print(f"wrote {folder}: {size / 1e3:.0f} kB, torch {torch.__version__}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[1] / "tests" / "goldens")
