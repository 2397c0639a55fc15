"""Finetuning jobs of the tests: rows, hyperparameters, and how they are uploaded, created and waited for."""

import json
import time

import openai

PINNED = dict(policy="fixed_budget", policy_options={"finetune_tokens": 128, "backward_units": 4})
ROWS = [{"prompt": f"{number} and 1 make ", "completion": f"{number + 1}, of course"} for number in range(8)]
FAST = {"rank": 4, "learning_rate": 0.02, "target_modules": ["q_proj", "down_proj"]}
SHORT = {"n_epochs": 2, "batch_size": 4, **FAST}
LONG = {"n_epochs": 100_000, "batch_size": 8, "schedule": "constant", **FAST}
FINAL = ("succeeded", "failed", "cancelled")
PROMPT = "3 and 1 make "


def jsonl(rows) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def upload(client, content: bytes, name: str = "rows.jsonl") -> openai.types.FileObject:
    return client.files.create(file=(name, content), purpose="fine-tune")


def create(client, file: str, hyperparameters: dict, **fields):
    method = {"type": "supervised", "supervised": {"hyperparameters": hyperparameters}}
    return client.fine_tuning.jobs.create(**{"model": "tiny", "training_file": file, "method": method, **fields})


def ended(client, job: str, seconds: float = 180.0):
    deadline = time.monotonic() + seconds
    while (found := client.fine_tuning.jobs.retrieve(job)).status not in FINAL:
        assert time.monotonic() < deadline, found
        time.sleep(0.02)
    return found
