"""JobQueue: seats and order."""

import pytest

from flexjax.fields import ConfigError
from flexjax.finetuning.job import FinetuneJob, JobStatus
from flexjax.finetuning.job_queue import JobQueue
from flexjax.finetuning.job_run import JobRun

ROWS = [{"input_ids": [1, 2, 3], "loss_mask": [0, 1, 1]}]


def make_run(name):
    job = FinetuneJob(name, ROWS)
    return JobRun.prepare(job, tokenizer=None, vocab_size=10, max_model_len=64, microbatch_tokens=64)


def queue_of(max_running, *runs):
    queue = JobQueue(max_running)
    for run in runs:
        queue.submit(run)
    return queue


def test_jobs_wait_for_a_seat_in_the_order_they_came():
    first, second, third = runs = [make_run(name) for name in "abc"]
    queue = queue_of(2, *runs)
    assert queue.admit() == [first, second]
    first.pause()
    assert queue.admit() == []  # a paused job keeps its seat
    assert queue.running() == [second]
    second.cancel()
    assert queue.admit() == [third]


def test_a_paused_job_that_has_not_begun_is_passed_over():
    first, second = make_run("a"), make_run("b")
    queue = queue_of(1, first, second)
    first.pause()
    assert queue.admit() == [second]
    first.resume()
    assert first.status is JobStatus.QUEUED
    second.fail("broken")
    assert queue.admit() == [first]


def test_a_name_is_free_again_once_its_job_ended():
    queue = queue_of(1, make_run("a"))
    with pytest.raises(ConfigError, match="a job named 'a' is queued"):
        queue.submit(make_run("a"))
    queue.runs[0].cancel()
    queue.submit(make_run("a"))
