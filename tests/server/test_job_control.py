"""Fine-tuning jobs paused, resumed, cancelled, queued, and ended by what is wrong with them."""

import threading

import openai
import pytest

from flexjax.request import SamplingParams
from tests.server.conftest import wait_until
from tests.server.jobs import LONG, PROMPT, ROWS, SHORT, create, ended, jsonl, upload
from tests.server.test_monitoring import samples

GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)


def backward_units(engine) -> int:
    """So far, as the records of all iterations tell."""
    return sum(record.backward_units for record in engine.loop.call(list, engine.loop.records))


def steps_of(client, job: str) -> int:
    events = client.fine_tuning.jobs.list_events(job, limit=100)
    return max((each.data["step"] for each in events if each.data), default=0)


def test_a_paused_job_computes_nothing_until_it_is_resumed_or_cancelled(tuning, tuner, rows):
    job = create(tuner, rows, LONG, suffix="endless")
    wait_until(lambda: steps_of(tuner, job.id) > 2)
    assert tuner.fine_tuning.jobs.pause(job.id).status == "paused"
    name = f"ft:tiny:flexjax:endless:{job.id[-8:]}"
    tuning.engine.generate([PROMPT], GREEDY)  # the iteration that was in flight has ended
    before = backward_units(tuning.engine)
    tuning.engine.generate([PROMPT] * 4, GREEDY)
    assert backward_units(tuning.engine) == before > 0
    assert tuner.fine_tuning.jobs.resume(job.id).status == "running"
    wait_until(lambda: backward_units(tuning.engine) > before)
    cancelled = tuner.fine_tuning.jobs.cancel(job.id)
    assert cancelled.status == "cancelled" and cancelled.fine_tuned_model is None and cancelled.finished_at
    assert tuner.fine_tuning.jobs.retrieve(job.id) == cancelled
    after = backward_units(tuning.engine)
    tuning.engine.generate([PROMPT] * 4, GREEDY)
    assert backward_units(tuning.engine) == after
    for action in ("cancel", "pause", "resume"):
        with pytest.raises(openai.BadRequestError, match="cancelled"):
            getattr(tuner.fine_tuning.jobs, action)(job.id)
    messages = [event.message for event in tuner.fine_tuning.jobs.list_events(job.id, limit=100)][::-1]
    kept = [each for each in messages if each.startswith("Fine-tuning ")]
    assert kept == ["Fine-tuning runs", "Fine-tuning is paused", "Fine-tuning runs", "Fine-tuning is cancelled"]
    with pytest.raises(openai.NotFoundError):
        tuner.completions.create(model=name, prompt=PROMPT)


def test_a_job_that_diverges_fails_and_serving_goes_on(tuning, tuner, rows):
    """The gradient of the first step is beyond float32."""
    done = ended(tuner, create(tuner, rows, {**SHORT, "rank": 1, "alpha": 1e38}).id)
    assert done.status == "failed" and done.error.code == "job_failed"
    assert "gradient norm" in done.error.message and f"of files/{rows}" in done.error.message
    assert tuning.config.data_dir not in done.error.message, "where the server keeps things is its own"
    assert tuner.fine_tuning.jobs.list_events(done.id, limit=1).data[0].level == "error"
    assert tuner.completions.create(model="tiny", prompt=PROMPT, max_tokens=1).choices


def test_a_job_whose_file_is_gone_fails(tuning, tuner):
    """The file is deleted before the job's turn to read it has come, as it may be while a server is down."""
    file, go_on = upload(tuner, jsonl(ROWS)).id, threading.Event()
    tuning.service.keeper._starter.submit(go_on.wait)
    try:
        job = create(tuner, file, SHORT)
        tuner.files.delete(file)
    finally:
        go_on.set()
    done = ended(tuner, job.id)
    assert done.status == "failed" and f"{file} is no longer there" in done.error.message


def test_more_jobs_than_may_run_wait_for_their_turn(tuning, tuner, rows):
    """Two may."""
    jobs = [create(tuner, rows, LONG).id for _ in range(3)]
    states = lambda: [tuner.fine_tuning.jobs.retrieve(job).status for job in jobs]
    wait_until(lambda: states() == ["running", "running", "queued"])
    now = samples(tuning)
    assert (now["flexjax:finetune_jobs", "running"], now["flexjax:finetune_jobs", "queued"]) == (2, 1)
    wait_until(lambda: sum(key[0] == "flexjax:finetune_loss" for key in samples(tuning)) == 2)
    tuner.fine_tuning.jobs.cancel(jobs[0])
    wait_until(lambda: states() == ["cancelled", "running", "running"])
    for job in jobs[1:]:
        tuner.fine_tuning.jobs.cancel(job)
