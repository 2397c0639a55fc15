"""Servers that are killed or stopped in the middle of a job: the next one has everything and goes on."""

import random
import re
import signal
import time
from collections import Counter
from pathlib import Path

import pytest

from flexjax.config import EngineConfig
from flexjax.engine.engine import Engine
from flexjax.server.config import ServerConfig
from tests.server.conftest import Running, wait_until
from tests.server.jobs import FAST, LONG, PINNED, PROMPT, ROWS, create, ended, jsonl, upload
from tests.server.processes import adapter_bytes, served, write_config
from tests.tiny_model import ENGINE

SEED = 20
STEPS, EVERY = 600, 60
LASTING = {**FAST, "batch_size": 4, "max_steps": STEPS, "checkpoint_every": EVERY, "schedule": "constant"}
ANSWER = {"prompt": PROMPT, "max_tokens": 12, "temperature": 0, "extra_body": {"ignore_eos": True}}


@pytest.fixture
def config(tmp_path, compilation_cache) -> Path:
    return write_config(tmp_path, compilation_cache)


def events_of(client, job: str) -> list:
    return list(client.fine_tuning.jobs.list_events(job, limit=1000))


def steps_in(events) -> list[int]:
    return sorted(event.data["step"] for event in events if event.data and "train_loss" in event.data)


def until_resumable(client, job: str) -> None:
    """They are written one after another, and a job can resume from one soon after it is listed: from the first, once
    there is a second."""
    deadline = time.monotonic() + 180
    while len(client.fine_tuning.jobs.checkpoints.list(job).data) < 2:
        assert time.monotonic() < deadline, client.fine_tuning.jobs.retrieve(job)
        time.sleep(0.01)


def test_a_killed_server_forgets_nothing(config):
    moment = random.Random(SEED)
    with served(config) as (process, client):
        files = [upload(client, jsonl(ROWS), f"{number}.jsonl").id for number in range(3)]
        client.files.delete(files[2])
        early = ended(client, create(client, files[1], {**FAST, "n_epochs": 1}, seed=1).id)
        assert early.status == "succeeded", early.error
        said = client.completions.create(model=early.fine_tuned_model, **ANSWER).choices[0].text
        lasting, held = (create(client, files[0], LASTING, seed=5, suffix=suffix) for suffix in ("lasting", "held"))
        assert client.fine_tuning.jobs.pause(held.id).status == "paused"
        until_resumable(client, lasting.id)
        time.sleep(moment.uniform(0.0, 0.3))
        told = events_of(client, lasting.id)
        told_before = {job.id: events_of(client, job.id) for job in (early, held)}
        process.send_signal(signal.SIGKILL)
        process.wait()
    with served(config) as (_, client):
        result = early.result_files[0]
        done = ended(client, lasting.id)
        assert done.status == "succeeded", done.error
        listed = [file.id for file in client.files.list()]
        assert sorted(listed) == sorted([*files[:2], result, done.result_files[0]])
        assert [job.id for job in client.fine_tuning.jobs.list()] == [held.id, lasting.id, early.id]
        assert client.fine_tuning.jobs.retrieve(early.id) == early
        check_events(client, lasting.id, told)
        for job, before in told_before.items():
            kept = Counter(event.id for event in events_of(client, job))
            assert {event.id for event in before} <= set(kept) and set(kept.values()) == {1}
        assert client.fine_tuning.jobs.retrieve(held.id).status == "paused"
        assert client.completions.create(model=early.fine_tuned_model, **ANSWER).choices[0].text == said
        check_adapter(config, client, done, held.id)


def check_events(client, job: str, told: list) -> None:
    """What was told before is there, once; and each step and checkpoint is told once."""
    events = events_of(client, job)
    counts = Counter(event.id for event in events)
    assert set(counts.values()) == {1} and {event.id for event in told} <= set(counts)
    assert [event for event in events if event.id in {each.id for each in told}] == told
    assert steps_in(events) == list(range(1, STEPS + 1))
    checkpoints = list(client.fine_tuning.jobs.checkpoints.list(job))
    assert [each.step_number for each in checkpoints] == list(range(STEPS, 0, -EVERY))
    restarts = [re.search(r"restarted; the job goes on after step (\d+)", event.message) for event in events]
    (step,) = [int(found[1]) for found in restarts if found]
    assert 0 < step < STEPS and step % EVERY == 0


def check_adapter(config: Path, client, done, held: str) -> None:
    """The same as of a job that was never killed; and a job that was held meanwhile comes to its end."""
    whole = ended(client, create(client, done.training_file, LASTING, seed=5).id)
    assert whole.status == "succeeded" and whole.trained_tokens == done.trained_tokens
    assert adapter_bytes(config, done.fine_tuned_model) == adapter_bytes(config, whole.fine_tuned_model)
    assert client.fine_tuning.jobs.resume(held).status in ("queued", "running")
    assert ended(client, held).status == "succeeded"
    name = client.fine_tuning.jobs.retrieve(held).fine_tuned_model
    assert adapter_bytes(config, name) == adapter_bytes(config, whole.fine_tuned_model)


def test_a_stopped_server_leaves_its_job_to_the_next(model, tmp_path, compilation_cache):
    """The job's last checkpoint is made when the engine closes, which is after the service has stopped."""
    settings = {**ENGINE, **PINNED, "model": model, "compilation_cache": compilation_cache}
    config = EngineConfig(**settings, checkpoint_dir=str(tmp_path / "checkpoints"))
    steps = []
    for round_ in range(2):
        engine = Engine.from_config(config)
        server = Running(engine, ServerConfig(port=0, data_dir=str(tmp_path)))
        server.start()
        with server.client() as client:
            if round_ == 0:
                job = create(client, upload(client, jsonl(ROWS)).id, {**LONG, "checkpoint_every": 100_000}).id
            before = max(steps, default=0)
            wait_until(lambda: max(steps_in(events_of(client, job)), default=0) > before + 3, seconds=60)  # noqa: B023
            assert client.fine_tuning.jobs.retrieve(job).status == "running"
            server.process.handle_exit(signal.SIGTERM, None)
        wait_until(lambda: server.stopped, seconds=60)  # noqa: B023
        engine.close()
        events = server.service.store.rows("events", {"job": job})
        steps = [row["data"]["step"] for row in events if "train_loss" in row["data"]]
        checkpoints = [row["step"] for row in server.service.store.rows("checkpoints", {"job": job})]
        server.service.close()
        assert steps == list(range(1, len(steps) + 1)) and len(checkpoints) == round_ + 1
    assert before == checkpoints[0] < checkpoints[1] == len(steps)
    assert any(f"goes on after step {checkpoints[0]}" in row["message"] for row in events)
    assert not any("cancelled" in row["message"] for row in events)
