"""A server whose data folder lies on a disk that is really full: uploads are refused, serving goes on, and what was
acknowledged is there when there is room again, and after the process was killed on the full disk."""

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack

import openai
import pytest

from tests.server.fault_record import TRIES, note
from tests.server.jobs import FAST, PROMPT, ROWS, create, ended, jsonl, upload
from tests.server.processes import served, write_config
from tests.server.small_disk import SmallDisk, small_disk

STEPS, EVERY = 120, 20
JOB = {**FAST, "batch_size": 4, "max_steps": STEPS, "checkpoint_every": EVERY, "schedule": "constant"}
ANSWER = {"model": "tiny", "prompt": PROMPT, "max_tokens": 6, "temperature": 0, "extra_body": {"ignore_eos": True}}
REFUSALS, ANSWERS = 3, 5


@pytest.fixture
def disk(tmp_path) -> Iterator[SmallDisk]:
    with small_disk(tmp_path / "data", size="24m") as disk:
        yield disk


class Ledger:
    """What was acknowledged: identifiers of files, and of a job its events and checkpoints with all they say."""

    def __init__(self):
        self.files: list[str] = []
        self.told: dict[str, object] = {}

    def look(self, client, job: str) -> list[int]:
        """The steps that are told now."""
        events = list(client.fine_tuning.jobs.list_events(job, limit=1000))
        checkpoints = list(client.fine_tuning.jobs.checkpoints.list(job))
        found = Counter(each.id for each in [*events, *checkpoints])
        assert set(found.values()) == {1} and set(self.told) <= set(found)
        for each in [*events, *checkpoints]:
            assert self.told.setdefault(each.id, each) == each
        assert set(self.files) <= {file.id for file in client.files.list()}
        return sorted(event.data["step"] for event in events if "train_loss" in (event.data or {}))


def fill(disk: SmallDisk, ledger: Ledger, client, job: str) -> int:
    """What clients see on the full disk: uploads and jobs are refused, all else goes on. Returns the newest step told
    at its end."""
    patient, refused = client.with_options(max_retries=0), 0
    before = client.completions.create(**ANSWER).choices[0].text
    while refused < REFUSALS:
        try:
            ledger.files.append(upload(patient, jsonl(ROWS * 40)).id)  # in what the others left
        except openai.InternalServerError as error:
            assert (error.status_code, error.code) == (507, "storage_full")
            refused += 1
    with pytest.raises(openai.InternalServerError) as caught:
        for _ in range(200):
            patient.fine_tuning.jobs.cancel(create(patient, ledger.files[0], JOB).id)
    assert caught.value.status_code == 507
    for _ in range(ANSWERS):
        assert client.completions.create(**ANSWER).choices[0].text == before
        time.sleep(0.2)
    return max(ledger.look(client, job), default=0)


def begun(client, ledger: Ledger, seed: int, step: int) -> str:
    """A job that has come so far."""
    job, deadline = create(client, ledger.files[0], JOB, seed=seed).id, time.monotonic() + 120
    while max(ledger.look(client, job), default=0) < step:
        assert time.monotonic() < deadline, client.fine_tuning.jobs.retrieve(job)
    return job


def adapter_on(disk: SmallDisk, name: str) -> bytes:
    return (disk.seen / "adapters" / name / "adapter_model.safetensors").read_bytes()


def check_end(disk: SmallDisk, ledger: Ledger, client, job: str) -> bytes:
    """The job succeeds, every step is told once; the bytes of its adapter."""
    done = ended(client, job)
    assert done.status == "succeeded", done.error
    assert ledger.look(client, job) == list(range(1, STEPS + 1))
    ledger.files.append(upload(client, jsonl(ROWS)).id)
    return adapter_on(disk, done.fine_tuned_model)


def test_a_disk_that_is_really_full(disk, tmp_path, compilation_cache):
    config = write_config(tmp_path, compilation_cache)
    first, second = Ledger(), Ledger()
    with served(config, inside=disk.inside) as (process, client):
        first.files.append(upload(client, jsonl(ROWS)).id)
        whole = ended(client, create(client, first.files[0], JOB, seed=5).id)
        adapter = adapter_on(disk, whole.fine_tuned_model)
        if TRIES > 1:
            job = begun(client, first, seed=5, step=30)
            with disk.full():
                assert fill(disk, first, client, job) < STEPS, "the job's events found room"
            assert check_end(disk, first, client, job) == adapter
        second.files = list(first.files)
        job = begun(client, second, seed=5, step=30)
        with ExitStack() as stack:
            with disk.full():
                reached = fill(disk, second, client, job)
                assert reached < STEPS, "the job's events found room"
                process.kill()
                process.wait()
                _, next_client = stack.enter_context(served(config, inside=disk.inside))  # which finds no room either
                assert next_client.completions.create(**ANSWER).choices
                second.look(next_client, job)
            assert check_end(disk, second, next_client, job) == adapter
    times = 1 + (TRIES > 1)
    counts = {"times": times, "refused": times * REFUSALS, "kept": len(second.files)}
    note("small disk", **counts, steps_before_room=reached, steps=STEPS)
