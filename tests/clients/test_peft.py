"""Hugging Face PEFT loads what the service exported: it gives every position the service's log-probabilities."""

import numpy as np
import pytest

from tests.clients.oracle import text_ids
from tests.clients.torch_reference import needs_torch, reference_logprobs, reference_version
from tests.server.jobs import FAST, PROMPT, ROWS, create, ended, jsonl, upload

pytestmark = needs_torch
PROMPTS = [PROMPT, "7 and 1 make 8, of course", "something else, " * 6]
JOB = {**FAST, "target_modules": "all-linear", "batch_size": 4, "n_epochs": 3}
TOLERANCE = 5e-5
"""Of log-probabilities of up to about 20: sums of two layers in float32, in another order."""


@pytest.fixture(scope="module")
def model(service) -> str:
    """What a job made of every linear layer."""
    client = service.client
    job = ended(client, create(client, upload(client, jsonl(ROWS)).id, JOB, seed=3, suffix="peft").id)
    assert job.status == "succeeded", job.error
    return job.fine_tuned_model


@pytest.fixture(scope="module")
def expected(service, model, noted) -> dict[str, list[np.ndarray]]:
    """PEFT's log-probabilities, and those of the base model."""
    ids = [text_ids(prompt) for prompt in PROMPTS]
    folders = {"adapter": service.data / "adapters" / model, "base": None}
    noted["peft"] = {"version": reference_version("peft"), "positions": sum(map(len, ids)) - len(ids)}
    return {name: reference_logprobs(service.model, folder, ids) for name, folder in folders.items()}


def test_every_position_has_the_same_logprobs(service, model, expected):
    body = {"prompt": PROMPTS, "echo": True, "logprobs": 5, "max_tokens": 0}
    answer = service.client.completions.create(model=model, **body)
    assert len(answer.choices) == len(PROMPTS)
    for choice, prompt, rows in zip(answer.choices, PROMPTS, expected["adapter"], strict=True):
        own = rows[np.arange(len(rows) - 1), text_ids(prompt)[1:]]
        assert choice.logprobs.token_logprobs[1:] == pytest.approx(own.tolist(), abs=TOLERANCE)
        likeliest = [max(top.values()) for top in choice.logprobs.top_logprobs[1:]]
        assert likeliest == pytest.approx(rows[:-1].max(-1).tolist(), abs=TOLERANCE)


def test_the_adapter_matters(expected):
    """So that an export of nothing would not go unnoticed."""
    for tuned, base in zip(expected["adapter"], expected["base"], strict=True):
        assert np.abs(tuned - base).max() > 1000 * TOLERANCE
