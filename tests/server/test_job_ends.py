"""Ends of jobs, whatever clients and the disk do meanwhile: written once, whole, and holding up no other job."""

import sqlite3
from collections import Counter

import httpx
import pytest

from tests.server.conftest import wait_until
from tests.server.jobs import PROMPT, ROWS, SHORT, create, ended, jsonl, upload

GREEDY = {"max_tokens": 12, "temperature": 0, "extra_body": {"ignore_eos": True}}


@pytest.fixture(scope="module")
def file(tuner) -> str:
    return upload(tuner, jsonl(ROWS)).id


@pytest.fixture(scope="module")
def undisturbed(tuning, tuner, file) -> bytes:
    """The adapter's file of a job that nobody disturbs."""
    return exported(tuning, ended(tuner, create(tuner, file, SHORT, seed=7).id))


def exported(tuning, job) -> bytes:
    assert job.status == "succeeded", job.error
    return (tuning.service.folder.adapter(job.fine_tuned_model) / "adapter_model.safetensors").read_bytes()


def post(tuning, action: str, name: str) -> int:
    return httpx.post(f"{tuning.url}/v1/{action}_lora_adapter", json={"lora_name": name}, timeout=30).status_code


def disk_full() -> sqlite3.OperationalError:
    error = sqlite3.OperationalError("database or disk is full")
    error.sqlite_errorcode = sqlite3.SQLITE_FULL
    return error


def fails(times: int, method):
    """A method that finds the disk full so often, and works then."""
    left = [times]

    def called(*arguments, **named):
        if left[0]:
            left[0] -= 1
            raise disk_full()
        return method(*arguments, **named)

    return called


def test_a_model_that_is_unloaded_before_its_end_is_written_down(tuning, tuner, file, undisturbed):
    """What the keeper writes waits until the name has gone."""
    with tuning.service.keeper._lock:
        job = create(tuner, file, SHORT, seed=7)
        name = f"ft:tiny:flexjax::{job.id[-8:]}"
        wait_until(lambda: name in tuning.engine.adapters.named, seconds=60)
        assert post(tuning, "unload", name) == 200
        assert name not in tuning.engine.adapters.named
    done = ended(tuner, job.id, seconds=30)
    assert exported(tuning, done) == undisturbed
    assert tuner.completions.create(model=name, prompt=PROMPT, **GREEDY).model == name


def test_an_end_is_written_once_however_often_it_is_tried(tuning, tuner, file, undisturbed, monkeypatch):
    """The disk is full at the first transaction of the end, and again behind it; then the client deletes the model."""
    service, before = tuning.service, set((tuning.service.folder.root / "files").iterdir())
    keeper, book = service.keeper, service.keeper._book
    monkeypatch.setattr("flexjax.server.job_keeper.FAULT_SECONDS", 0.01)
    monkeypatch.setattr(book, "_end", fails(2, book._end))
    pruned = fails(2, service.trained.prune)
    final = lambda job: service.store.find("jobs", id=job)["status"] == "succeeded"
    usual = service.trained.prune
    monkeypatch.setattr(service.trained, "prune", lambda job: pruned(job) if final(job) else usual(job))
    job = create(tuner, file, SHORT, seed=7)
    done = ended(tuner, job.id, seconds=60)
    assert exported(tuning, done) == undisturbed
    assert tuner.models.delete(done.fine_tuned_model).deleted
    wait_until(lambda: job.id not in keeper._live)
    assert tuner.fine_tuning.jobs.retrieve(job.id) == done
    told = Counter(event.message for event in tuner.fine_tuning.jobs.list_events(job.id, limit=1000))
    assert told[f"The job has ended; the new model is {done.fine_tuned_model}"] == 1
    results = [each for each in service.store.rows("files", {}) if each["filename"] == f"{job.id}-results.csv"]
    assert [each["id"] for each in results] == done.result_files
    left = set((service.folder.root / "files").iterdir()) - before
    assert left == {service.folder.file(done.result_files[0])}, "a try that failed has left its file"


def test_a_model_that_is_deleted_before_all_of_its_end_is_done(tuning, tuner, file, monkeypatch):
    """The row says that the job has succeeded, and what is left to do fails until the client has deleted the model."""
    service, deleted = tuning.service, []
    usual = service.trained.prune

    def prune(job: str) -> None:
        if service.store.find("jobs", id=job)["status"] == "succeeded" and not deleted:
            raise disk_full()
        usual(job)

    monkeypatch.setattr("flexjax.server.job_keeper.FAULT_SECONDS", 0.01)
    monkeypatch.setattr(service.trained, "prune", prune)
    done = ended(tuner, create(tuner, file, SHORT).id, seconds=60)
    assert tuner.models.delete(done.fine_tuned_model).deleted
    deleted.append(done.id)
    wait_until(lambda: done.id not in service.keeper._live)
    assert tuner.fine_tuning.jobs.retrieve(done.id) == done


def test_a_job_whose_end_cannot_be_written_holds_up_no_other(tuning, tuner, file, undisturbed, monkeypatch):
    book = tuning.service.keeper._book
    succeed, stuck, room = book.succeed, [], []

    def full(identifier, *arguments):
        if identifier in stuck and not room:
            raise disk_full()
        succeed(identifier, *arguments)

    monkeypatch.setattr("flexjax.server.job_keeper.FAULT_SECONDS", 0.01)
    monkeypatch.setattr(book, "succeed", full)
    with tuning.service.keeper._lock:
        first = create(tuner, file, SHORT, seed=7)
        stuck.append(first.id)
    wait_until(lambda: tuning.engine.adapters.named.get(f"ft:tiny:flexjax::{first.id[-8:]}") is not None, seconds=60)
    second = create(tuner, file, SHORT, seed=7)
    assert exported(tuning, ended(tuner, second.id, seconds=60)) == undisturbed
    assert tuner.fine_tuning.jobs.retrieve(first.id).status != "succeeded"
    room.append(True)
    assert exported(tuning, ended(tuner, first.id, seconds=60)) == undisturbed
