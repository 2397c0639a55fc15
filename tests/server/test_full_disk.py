"""No room on the disk, for files and for the database: clients are told, serving and training go on, and what could not
be written down is, once there is room again."""

import contextlib
import errno
from collections import Counter
from contextlib import contextmanager

import openai
import pytest

from flexjax.server import data_folder
from tests.server.conftest import wait_until
from tests.server.fault_record import note
from tests.server.jobs import FAST, PROMPT, ROWS, create, ended, jsonl, upload

JOB = {**FAST, "batch_size": 4, "max_steps": 120, "checkpoint_every": 40, "schedule": "constant"}
ALL_PAGES = 2**30


@contextmanager
def database_full(service):
    """SQLite says that the disk is full as soon as the file would have to grow."""
    connection = service.store._connection
    with service.store._lock:
        (pages,) = connection.execute("PRAGMA page_count").fetchone()
        connection.execute(f"PRAGMA max_page_count = {pages}")
    try:
        yield
    finally:
        with service.store._lock:
            connection.execute(f"PRAGMA max_page_count = {ALL_PAGES}")


def files_on_disk(service) -> list[str]:
    return sorted(file.name for file in (service.folder.root / "files").iterdir())


def steps_of(client, job: str) -> list[int]:
    events = client.fine_tuning.jobs.list_events(job, limit=1000)
    return [event.data["step"] for event in events if "train_loss" in (event.data or {})]


def test_an_upload_that_finds_no_room_leaves_nothing(tuning, tuner, monkeypatch):
    def full(path):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    before, listed = files_on_disk(tuning.service), len(list(tuner.files.list()))
    with monkeypatch.context() as patch:
        patch.setattr(data_folder, "flush", full)
        with pytest.raises(openai.InternalServerError) as caught:
            upload(tuner.with_options(max_retries=0), jsonl(ROWS))
    assert caught.value.status_code == 507 and caught.value.code == "storage_full"
    assert files_on_disk(tuning.service) == before and len(list(tuner.files.list())) == listed
    kept = upload(tuner, jsonl(ROWS)).id
    assert sorted([*before, kept]) == files_on_disk(tuning.service)


def test_a_database_without_room_stops_no_request_and_no_job(tuning, tuner):
    """Uploads fill what is left of its pages; then the job's events find no room."""
    file = upload(tuner, jsonl(ROWS)).id
    undisturbed = ended(tuner, create(tuner, file, JOB, seed=3).id)
    job, patient = create(tuner, file, JOB, seed=3), tuner.with_options(max_retries=0)
    wait_until(lambda: len(steps_of(tuner, job.id)) > 2, seconds=60)
    kept, created, refused = [], [], 0
    with database_full(tuning.service):
        while refused < 3:
            try:
                kept.append(upload(patient, jsonl(ROWS)).id)
            except openai.InternalServerError as error:
                assert error.status_code == 507
                refused += 1
        with pytest.raises(openai.InternalServerError) as caught:
            for _ in range(100):
                created.append(create(patient, file, JOB).id)
        assert caught.value.status_code == 507
        engine = tuning.engine
        (name,) = [run.job.name for run in engine.trainer.queue.runs if run.job.name.endswith(job.id[-8:])]
        wait_until(lambda: engine.trainer.jobs[name].run.status.final, seconds=60)
        for _ in range(3):
            assert tuner.completions.create(model="tiny", prompt=PROMPT, max_tokens=2).choices
        seen = len(steps_of(tuner, job.id))
    done = ended(tuner, job.id, 60)
    assert seen < 120, "the database had room for all events"
    for each in created:
        with contextlib.suppress(openai.BadRequestError):  # it may have ended
            tuner.fine_tuning.jobs.cancel(each)
        assert ended(tuner, each).status in ("cancelled", "succeeded")
    assert done.status == "succeeded" and sorted(steps_of(tuner, done.id)) == list(range(1, 121))
    adapters = [tuning.service.folder.adapter(each.fine_tuned_model) for each in (undisturbed, done)]
    first, second = [(folder / "adapter_model.safetensors").read_bytes() for folder in adapters]
    assert first == second
    listed = Counter(each.id for each in tuner.files.list())
    assert set(kept) <= set(listed) and set(listed.values()) == {1}
    assert set(files_on_disk(tuning.service)) >= set(kept)
    note("full disk", refused=refused, kept=len(kept), jobs=len(created) + 1, steps_before_room=seen, steps=120)
