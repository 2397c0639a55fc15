"""JobRun: the path through groups and evaluations, what it reports, and that resuming equals never stopping."""

import itertools
import json
import weakref

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexjax.fields import ConfigError
from flexjax.finetuning.job import FinetuneJob, JobStatus
from flexjax.finetuning.job_run import JobRun


def rows(count, length=60):
    return [{"input_ids": [row + 1] * length, "loss_mask": [0] + [1] * (length - 1)} for row in range(count)]


def make_run(data=None, *, validation=None, microbatch_tokens=128, max_model_len=4096, **values):
    job = FinetuneJob("keeper", rows(10) if data is None else data, validation, **{"batch_size": 4} | values)
    limits = {"vocab_size": 1000, "max_model_len": max_model_len, "microbatch_tokens": microbatch_tokens}
    return JobRun.prepare(job, tokenizer=None, clock=itertools.count().__next__, **limits)


def place(microbatch):
    return microbatch.step, microbatch.evaluation, microbatch.index, microbatch.lines


def train(run, microbatches=None):
    """Goes along at most so many microbatches, with losses that depend on the data alone; returns the path."""
    path = []
    while not run.exhausted and len(path) != microbatches:
        microbatch = run.peek()
        path.append(place(microbatch))
        run.advance()
        if microbatch.closes_group and microbatch.evaluation:
            run.record_evaluation(1.0 + microbatch.step)
        elif microbatch.closes_group:
            run.record_step(sum(microbatch.lines) / 7, grad_norm=2.0)
    return path


def untimed(events):
    return [{key: value for key, value in event.items() if key != "time"} for event in events]


def of_type(run, kind):
    return [event for event in untimed(run.events) if event["type"] == kind]


def test_the_path_through_two_epochs():
    run = make_run(epochs=2)
    assert run.total_steps == 6
    path = train(run)
    assert [step[:3] for step in path[:5]] == [
        (0, False, 0),
        (0, False, 1),
        (1, False, 0),
        (1, False, 1),
        (2, False, 0),
    ]
    for epoch in (path[:5], path[5:]):
        assert sorted(line for *_, lines in epoch for line in lines) == list(range(1, 11))
    assert run.peek() is None


class Rows(list):
    """Can be referred to weakly."""


def test_rows_that_were_read_are_not_kept():
    """Only how messages name them."""
    data, validation = Rows(rows(10)), Rows(rows(3))
    read = [weakref.ref(each) for each in (data, validation)]
    run = make_run(data, validation=validation)
    del data, validation
    assert [each() for each in read] == [None, None]
    assert (run.job.data, run.job.validation) == ("data", "data")


def test_a_microbatch_stays_until_it_is_passed():
    run = make_run()
    assert run.peek() is run.peek()
    first = run.peek()
    run.advance()
    assert run.peek() is not first


def test_looking_ahead_ends_with_the_group():
    run = make_run()
    assert [run.peek(ahead) and place(run.peek(ahead))[2] for ahead in range(3)] == [0, 1, None]
    second = run.peek(1)
    run.advance()
    assert run.peek() is second and second.closes_group and run.peek(1) is None


def test_events_tell_steps_and_epochs():
    run = make_run(learning_rate=1.0, schedule="linear")
    train(run)
    steps = of_type(run, "step")
    assert [event["step"] for event in steps] == [1, 2, 3]
    assert [event["learning_rate"] for event in steps] == pytest.approx([1, 2 / 3, 1 / 3])
    assert [event["tokens"] for event in steps] == [4 * 59, 4 * 59, 2 * 59]
    assert [event["loss"] for event in steps] == run.losses
    assert of_type(run, "epoch") == [{"type": "epoch", "step": 3, "epoch": 1}]
    assert [event["time"] for event in run.events] == list(range(4))
    json.dumps(run.events)


def test_the_evaluation_split_follows_its_steps():
    run = make_run(validation=rows(3), epochs=2, evaluate_every=2)
    evaluations = [step for step in train(run) if step[1]]
    assert [event["step"] for event in of_type(run, "evaluation")] == [2, 3, 4, 6]
    assert evaluations[:2] == [(2, True, 0, (1, 2)), (2, True, 1, (3,))]
    assert of_type(run, "evaluation")[0]["loss"] == 3.0


def test_steps_of_so_many_tokens_are_counted_in_whole_tiles():
    """59 tokens to compute fill a tile of 64: eight such sequences, and not nine, fill four microbatches of 128."""
    run = make_run(rows(20), batch_tokens=4 * 128, epochs=1)
    path = train(run)
    assert [(step, index) for step, _, index, _ in path] == [(i // 4, i % 4) for i in range(10)]
    assert {len(lines) for *_, lines in path} == {2}


def test_without_a_split_nothing_is_evaluated():
    assert not any(evaluation for _, evaluation, *_ in train(make_run(evaluate_every=1)))


@given(stop=st.integers(0, 24), tokens=st.sampled_from([None, 150]))
def test_resumed_equals_never_stopped(stop, tokens):
    settings = {"validation": rows(3), "epochs": 2, "evaluate_every": 2, "batch_tokens": tokens}
    whole = make_run(**settings)
    whole_path = train(whole)

    stopped = make_run(**settings)
    path = train(stopped, stop)
    resumed = make_run(**settings)
    resumed.load_state_dict(json.loads(json.dumps(stopped.state_dict())))
    unfinished = stopped.position.index  # microbatches whose gradients no checkpoint keeps
    path = path[: len(path) - unfinished] + train(resumed)

    assert path == whole_path
    assert resumed.losses == whole.losses
    assert untimed(resumed.events) == untimed(whole.events)


def test_a_changed_setting_or_row_cannot_resume():
    state = make_run().state_dict()
    make_run(weight=2.0, checkpoint_every=5).load_state_dict(state)
    with pytest.raises(ConfigError, match="cannot resume from its checkpoint: learning_rate was 0.0001 and is 0.001"):
        make_run(learning_rate=1e-3).load_state_dict(state)
    with pytest.raises(ConfigError, match="microbatch_tokens was 128 and is 256"):
        make_run(microbatch_tokens=256).load_state_dict(state)
    with pytest.raises(ConfigError, match="data was"):
        make_run(rows(10, length=61)).load_state_dict(state)


def test_a_state_waits_for_results():
    run = make_run(batch_size=1)
    run.advance()
    assert not run.settled
    with pytest.raises(AssertionError, match="results are still to be recorded"):
        run.state_dict()
    run.record_step(1.0, 1.0)
    assert run.settled and run.position.index == 0


@pytest.mark.parametrize(("loss", "norm"), [(float("nan"), 1.0), (1.0, float("inf"))])
def test_a_loss_that_is_no_number_fails_the_job_with_its_rows(loss, norm):
    run = make_run()
    run.start()
    train(run, 2)
    lines = sorted((*run.peek().lines, *run.group_lines(1)))
    train(run, 1)
    assert set(run.peek().lines) <= set(lines)
    run.advance()
    run.record_step(loss, norm)
    assert run.status is JobStatus.FAILED
    rate = f"{run.learning_rate(1):g}"
    assert f"loss is {loss}, gradient norm {norm} and learning rate {rate} at step 2" in run.error
    assert f"at step 2; its data rows are {', '.join(map(str, run.group_lines(1)))} of data" in run.error
    assert run.events[-1]["lines"] == list(run.group_lines(1))
    assert len(run.losses) == 1


def test_results_after_the_end_are_dropped():
    run = make_run()
    run.start()
    train(run, 1)
    run.advance()
    run.cancel()
    run.record_step(float("nan"), 1.0)
    assert (run.status, run.losses, run.settled) == (JobStatus.CANCELLED, [], True)


def test_an_evaluation_that_is_no_number_fails_the_job():
    run = make_run(rows(1), validation=rows(1))
    run.start()
    train(run, 1)
    run.advance()
    run.record_evaluation(float("nan"))
    assert run.error == "job 'keeper': evaluation loss is nan at step 1"


def test_statuses_follow_their_table():
    run = make_run()
    run.pause()
    run.resume()
    assert run.status is JobStatus.QUEUED and not run.holds_seat
    run.start()
    run.pause()
    assert run.holds_seat
    run.resume()
    train(run)
    run.succeed()
    assert [event["status"] for event in of_type(run, "status")] == [
        "paused", "queued", "running", "paused", "running", "succeeded",
    ]  # fmt: skip
    with pytest.raises(ConfigError, match="job 'keeper' is succeeded; it cannot become paused"):
        run.pause()


def test_checkpoints_are_events():
    run = make_run()
    run.record_checkpoint("here/3", step=3)
    run.record_checkpoint_failure("disk full", step=6)
    assert untimed(run.events) == [
        {"type": "checkpoint", "step": 3, "path": "here/3"},
        {"type": "checkpoint_failed", "step": 6, "error": "disk full"},
    ]


def test_lengths_beyond_the_model_or_the_microbatch_are_refused():
    with pytest.raises(ConfigError, match="max_length is 200; max_model_len is 100 tokens"):
        make_run(max_length=200, max_model_len=100)
    with pytest.raises(ConfigError, match="microbatch_tokens is 128"):
        make_run(rows(2, length=300), max_length=300)
    assert make_run(rows(2, length=300)).train.truncated == 2
