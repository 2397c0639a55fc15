"""What transformers, PEFT and torch compute, for the tests of this folder to compare with. It knows nothing of flexjax.

    python reference.py TASKS.json          (the Python of FLEXJAX_PARITY_PYTHON: torch, transformers and peft)

The file holds a list of objects, done in order; "do" names a function of `TASKS`, the other keys are its arguments.
Everything is float32 with the plainest attention there is. Sequences in result files are numbered n = 0, 1, ...
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, get_scheduler

NOT_A_TARGET = -100


def load_model(model: str) -> torch.nn.Module:
    """A model directory; an array that is missing, unexpected or of another shape is an error."""
    loaded, report = AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    faults = {name: sorted(map(str, each)) for name, each in report.items() if each}
    if faults:
        raise ValueError(f"transformers finds faults in {model}: {faults}")
    return loaded.eval()


def load(model: str, adapter: str | None, trainable: bool = False) -> torch.nn.Module:
    base = load_model(model)
    return base if adapter is None else PeftModel.from_pretrained(base, adapter, is_trainable=trainable).eval()


def write_adapter(model: str, output: str, settings: dict, seed: int) -> None:
    """A random adapter as PEFT saves it; ``settings`` are the arguments of its LoraConfig."""
    torch.manual_seed(seed)
    adapted = get_peft_model(load_model(model), LoraConfig(task_type="CAUSAL_LM", **settings))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    adapted.save_pretrained(output)


@torch.no_grad()
def answer(model: str, adapter: str | None, prompts: list[list[int]], new_tokens: int, output: str) -> None:
    """Greedy continuations: tokens_n [T], prompt included, and logprobs_n [T, vocab] of the token after each."""
    answering, results = load(model, adapter), {}
    answering.generation_config.eos_token_id = None
    for number, prompt in enumerate(prompts):
        tokens = torch.tensor(prompt)[None]
        if new_tokens:
            greedy = {"do_sample": False, "max_new_tokens": new_tokens, "pad_token_id": 0}
            tokens = answering.generate(tokens, attention_mask=torch.ones_like(tokens), **greedy)
        logits = answering(tokens).logits[0]
        results[f"tokens_{number}"] = tokens[0].numpy()
        results[f"logprobs_{number}"] = torch.log_softmax(logits.double(), dim=-1).numpy()
    np.savez(output, **results)


def padded_batch(rows: list[dict]) -> dict[str, torch.Tensor]:
    """Rows {"input_ids", "loss_mask"} as the model takes them: filled up at the end, -100 where there is no target."""
    length = max(len(row["input_ids"]) for row in rows)
    filled = lambda values, idle: values + [idle] * (length - len(values))
    labels = [[i if m else NOT_A_TARGET for i, m in zip(r["input_ids"], r["loss_mask"], strict=True)] for r in rows]
    return {
        "input_ids": torch.tensor([filled(row["input_ids"], 0) for row in rows]),
        "attention_mask": torch.tensor([filled([1] * len(row["input_ids"]), 0) for row in rows]),
        "labels": torch.tensor([filled(each, NOT_A_TARGET) for each in labels]),
    }


def loss_of(model: torch.nn.Module, rows: list[dict]) -> torch.Tensor:
    """transformers' own loss, divided by the targets of the whole batch as its Trainer does."""
    batch = padded_batch(rows)
    targets = (batch["labels"][:, 1:] != NOT_A_TARGET).sum()
    return model(**batch, num_items_in_batch=targets).loss


def train(model: str, adapter: str, groups: list[list[dict]], settings: dict, output: str) -> None:
    """Finetunes an adapter, one optimizer step a group of rows, all of them in one batch.

    Args:
        settings: learning_rate, weight_decay, max_grad_norm (None does not clip), schedule, warmup_steps.
        output: directory for the adapter as PEFT saves it, and steps.json: per step loss, grad_norm (before
            clipping) and learning_rate, as the events of a finetuning job have them.
    """
    learner = load(model, adapter, trainable=True)
    trained = [parameter for parameter in learner.parameters() if parameter.requires_grad]
    rate, decay = settings["learning_rate"], settings["weight_decay"]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=decay)
    schedule = get_scheduler(settings["schedule"], optimizer, settings["warmup_steps"], len(groups))
    limit, steps = settings["max_grad_norm"], []
    for rows in groups:
        optimizer.zero_grad()
        loss = loss_of(learner, rows)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, float("inf") if limit is None else limit)
        steps.append({"loss": loss.item(), "grad_norm": norm.item(), "learning_rate": schedule.get_last_lr()[0]})
        optimizer.step()
        schedule.step()
    learner.save_pretrained(output)
    Path(output, "steps.json").write_text(json.dumps(steps))


def merge(model: str, adapter: str, output: str) -> None:
    """The weights of the model with an adapter merged into them, by their names in the model's files."""
    merged = load(model, adapter).merge_and_unload().state_dict()
    if AutoModelForCausalLM.from_pretrained(model).config.tie_word_embeddings:
        del merged["lm_head.weight"]
    save_file({name: value.contiguous() for name, value in merged.items()}, output)


def chat(tokenizer: str, conversations: list[dict], texts: list[str], output: str) -> None:
    """What a tokenizer makes of conversations ({"messages"} and further arguments of apply_chat_template) and texts.

    Writes {"conversations": [{"text", "ids"}], "texts": [{"ids", "decoded"}]}.
    """
    loaded, rendered = AutoTokenizer.from_pretrained(tokenizer), []
    for each in conversations:
        messages = each.pop("messages")
        text = loaded.apply_chat_template(messages, tokenize=False, **each)
        rendered.append({"text": text, "ids": loaded.apply_chat_template(messages, return_dict=False, **each)})
    encoded = [{"ids": loaded.encode(text), "decoded": loaded.decode(loaded.encode(text))} for text in texts]
    Path(output).write_text(json.dumps({"conversations": rendered, "texts": encoded}))


TASKS = {"write_adapter": write_adapter, "answer": answer, "train": train, "merge": merge, "chat": chat}


def main(file: str) -> None:
    torch.set_num_threads(1)  # the order of sums, and so the last bits, must not depend on the machine
    for task in json.loads(Path(file).read_text(encoding="utf-8")):
        TASKS[task.pop("do")](**task)


if __name__ == "__main__":
    main(sys.argv[1])
