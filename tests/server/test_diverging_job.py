"""A job whose learning rate is far too high: it fails with the reason, no answer holds what JSON has no number for, and
requests in the same steps are answered as ever."""

import json
import threading

import httpx
from prometheus_client.parser import text_string_to_metric_families as parse

from tests.server.jobs import FAST, PROMPT, ROWS, create, ended, jsonl, upload

DIVERGING = {**FAST, "batch_size": 4, "max_steps": 60, "checkpoint_every": 1, "schedule": "constant"}
RATE = 1e38
"""Weights of this size are finite in float32; what a layer makes of them is not."""

ANSWER = {"model": "tiny", "prompt": PROMPT, "max_tokens": 20, "temperature": 0, "extra_body": {"ignore_eos": True}}


def strict(text: str):
    """Parsed as JSON, which has no NaN."""

    def refuse(constant: str):
        raise AssertionError(f"{constant} in {text[:2000]}")

    return json.loads(text, parse_constant=refuse)


def test_a_job_that_diverges_fails_with_the_reason_and_harms_nobody(tuning, tuner):
    before, answers, over = tuner.completions.create(**ANSWER).choices[0].text, [], threading.Event()

    def ask() -> None:
        while not over.is_set():
            answers.append(tuner.completions.create(**ANSWER).choices[0].text)

    asking = threading.Thread(target=ask)
    asking.start()
    held_out = upload(tuner, jsonl(ROWS[:2])).id
    hyperparameters = {**DIVERGING, "learning_rate": RATE}
    job = create(tuner, upload(tuner, jsonl(ROWS)).id, hyperparameters, validation_file=held_out, seed=1).id
    done = ended(tuner, job)
    for _ in range(3):
        answers.append(tuner.completions.create(**ANSWER).choices[0].text)
    over.set()
    asking.join(60)
    assert set(answers) == {before} and len(answers) > 3
    assert done.status == "failed" and done.fine_tuned_model is None and done.result_files == []
    assert "loss is nan" in done.error.message or "gradient norm nan" in done.error.message
    assert "learning rate 1e+38 at step" in done.error.message
    paths = [f"v1/fine_tuning/jobs{path}" for path in ("", f"/{job}", f"/{job}/events", f"/{job}/checkpoints")]
    for path in [*paths, "dashboard.json"]:
        answer = httpx.get(f"{tuning.url}/{path}")
        assert answer.status_code == 200 and strict(answer.text)
    losses = [event.data["train_loss"] for event in tuner.fine_tuning.jobs.list_events(job) if event.data]
    assert losses, "the first step is computed before any update"
    for sample in (sample for family in parse(httpx.get(f"{tuning.url}/metrics").text) for sample in family.samples):
        assert sample.value == sample.value, f"{sample.name} is not a number"
