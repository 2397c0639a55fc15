"""lm-eval over /v1/completions: the log-likelihoods and the scores that transformers gives on the same model."""

import itertools
import random
import string

import numpy as np
import pytest

from tests.clients.foreign import drive, needs
from tests.clients.oracle import text_ids
from tests.clients.torch_reference import needs_torch, reference_logprobs
from tests.tiny_model import ENGINE

pytestmark = [needs("lm-eval"), needs_torch]
TOLERANCE = 1e-4
"""Of sums of up to seven log-probabilities of up to about 20, in float32 on both sides."""


def questions(count: int) -> list[dict]:
    """Random words, of which the last are the choices: what is right is drawn too, so that the score says something."""
    draw = random.Random(3)
    word = lambda most: "".join(draw.choices(string.ascii_lowercase, k=draw.randint(2, most)))
    asked = lambda: " ".join(word(9) for _ in range(draw.randint(1, 12)))
    one = lambda: {"question": asked(), "choices": [word(6) for _ in range(4)], "right": draw.randrange(4)}
    return [one() for _ in range(count)]


QUESTIONS = questions(16)


@pytest.fixture(scope="module")
def seen(service, tmp_path_factory, noted) -> dict:
    task = {"folder": str(tmp_path_factory.mktemp("task")), "questions": QUESTIONS, "length": ENGINE["max_model_len"]}
    found = drive("lm-eval", "with_lm_eval.py", service.task | task)
    noted["lm-eval"] = {"version": found["version"], "questions": len(QUESTIONS), "acc": found["scores"]["acc"]}
    return found


@pytest.fixture(scope="module")
def expected(service, tmp_path_factory) -> list[list[tuple[float, bool]]]:
    """By question and choice: transformers' log-likelihood, and whether each token is the likeliest."""
    texts = [(each["question"], f" {choice}") for each in QUESTIONS for choice in each["choices"]]
    ids = [text_ids(question + choice) for question, choice in texts]
    found = []
    for (_, choice), tokens, rows in zip(texts, ids, reference_logprobs(service.model, None, ids), strict=True):
        count = len(text_ids(choice))
        own, rows = tokens[-count:], rows[-count - 1 : -1]
        found.append((rows[np.arange(count), own].sum(), bool((rows.argmax(-1) == own).all())))
    return list(itertools.batched(found, 4))


def test_log_likelihoods(seen, expected):
    assert len(seen["answers"]) == len(QUESTIONS)
    for answers, reference in zip(seen["answers"], expected, strict=True):
        for (value, greedy), (wanted, likeliest) in zip(answers, reference, strict=True):
            assert value == pytest.approx(wanted, abs=TOLERANCE) and bool(greedy) == likeliest


def test_scores(seen, expected):
    likelihoods = np.array([[value for value, _ in answers] for answers in expected])
    lengths = np.array([[len(choice) for choice in each["choices"]] for each in QUESTIONS])
    right = np.array([each["right"] for each in QUESTIONS])
    assert 0 < seen["scores"]["acc"] < 1, "a score that says nothing"
    assert seen["scores"]["acc"] == (likelihoods.argmax(-1) == right).mean()
    assert seen["scores"]["acc_norm"] == ((likelihoods / lengths).argmax(-1) == right).mean()
