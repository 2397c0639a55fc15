"""Fine-tuning jobs through OpenAI's client, from the upload to answers of the new model."""

import csv
import io

import httpx
import numpy as np
import openai
import pytest

from flexjax.request import SamplingParams
from flexjax.weights.peft import read_adapter
from tests.server.jobs import LONG, PROMPT, ROWS, SHORT, create, ended

GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)


def test_a_job_says_what_it_was_asked_and_what_it_made(finished, rows):
    assert finished.id.startswith("ftjob-") and finished.object == "fine_tuning.job"
    assert finished.fine_tuned_model == f"ft:tiny:flexjax:sums:{finished.id[-8:]}"
    assert (finished.model, finished.training_file, finished.seed, finished.error) == ("tiny", rows, 7, None)
    assert (finished.hyperparameters.n_epochs, finished.hyperparameters.batch_size) == (2, 4)
    assert finished.hyperparameters.learning_rate_multiplier == "auto"
    assert finished.metadata == {"team": "a"} and finished.finished_at >= finished.created_at
    computed = [len(row["prompt"] + row["completion"]) for row in ROWS]  # a token a byte; the end is only a target
    assert finished.trained_tokens == 2 * sum(computed)


def test_events_tell_each_step_once_and_in_order(tuner, finished):
    events = list(tuner.fine_tuning.jobs.list_events(finished.id, limit=3))[::-1]
    assert len({event.id for event in events}) == len(events)
    assert [event.data["step"] for event in events if event.data and "train_loss" in event.data] == [1, 2, 3, 4]
    assert [event.data["step"] for event in events if event.data and "valid_loss" in event.data] == [2, 4]
    messages = [event.message for event in events]
    assert messages[0].startswith("Created fine-tuning job") and finished.fine_tuned_model in messages[-1]
    assert sum("Fine-tuning runs" in each for each in messages) == 1
    first = tuner.fine_tuning.jobs.list_events(finished.id, limit=3)
    assert first.has_more and [each.id for each in first.data] == [each.id for each in events[:-4:-1]]


def test_checkpoints_tell_the_losses_of_their_steps(tuner, finished):
    """One is kept before what is held out has been measured, or after it."""
    told: dict[int, dict] = {}
    for event in tuner.fine_tuning.jobs.list_events(finished.id, limit=100):
        told.setdefault((event.data or {}).get("step"), {}).update(event.data or {})
    found = list(tuner.fine_tuning.jobs.checkpoints.list(finished.id))
    assert [each.step_number for each in found] == [4, 2]
    for each in found:
        metrics, expected = each.metrics, told[each.step_number]
        assert (metrics.train_loss, metrics.valid_loss) == (expected["train_loss"], expected["valid_loss"])
        assert metrics.full_valid_loss == metrics.valid_loss and metrics.step == each.step_number


def test_results_are_a_table(tuner, finished):
    (identifier,) = finished.result_files
    table = list(csv.DictReader(io.StringIO(tuner.files.content(identifier).text)))
    assert [row["step"] for row in table] == ["1", "2", "3", "4"]
    assert [bool(row["valid_loss"]) for row in table] == [False, True, False, True]
    assert sum(int(row["tokens"]) for row in table) == finished.trained_tokens
    assert float(table[-1]["train_loss"]) < float(table[0]["train_loss"])
    assert float(table[0]["learning_rate"]) > float(table[-1]["learning_rate"]) > 0
    assert identifier in [file.id for file in tuner.files.list(purpose="fine-tune-results")]


def test_the_new_model_answers_by_its_name(tuning, tuner, finished):
    name, engine = finished.fine_tuned_model, tuning.engine
    settings = {"max_tokens": 12, "temperature": 0, "extra_body": {"ignore_eos": True}}
    answer = tuner.completions.create(model=name, prompt=PROMPT, **settings)
    mine, base = (engine.generate([PROMPT], GREEDY, adapter)[0].text for adapter in (name, None))
    assert answer.model == name and answer.choices[0].text == mine != base
    messages = [{"role": "user", "content": PROMPT}]
    chat = tuner.chat.completions.create(model=name, messages=messages, **settings)
    assert chat.choices[0].message.content == engine.chat([messages], GREEDY, name)[0].text
    card = tuner.models.retrieve(name)
    assert card.parent == "tiny" and card in list(tuner.models.list())


def assert_same(adapter, expected) -> None:
    assert set(adapter.weights) == set(expected.weights)
    for module, pair in expected.weights.items():
        for mine, theirs in zip(adapter.weights[module], pair, strict=True):
            np.testing.assert_array_equal(mine, theirs, err_msg=module)


def test_the_new_model_is_exported(tuning, finished):
    name = finished.fine_tuned_model
    exported = read_adapter(tuning.service.folder.root / "adapters" / name, tuning.engine.model)
    assert_same(exported, tuning.engine.adapter(name))


def test_checkpoints_are_models(tuning, tuner, finished):
    page = tuner.fine_tuning.jobs.checkpoints.list(finished.id, limit=1)
    assert page.has_more
    last, first = list(page)
    assert (first.step_number, last.step_number) == (2, 4) and first.fine_tuning_job_id == finished.id
    assert first.fine_tuned_model_checkpoint == f"{finished.fine_tuned_model}:ckpt-step-2"
    events = list(tuner.fine_tuning.jobs.list_events(finished.id, limit=100))
    losses = {each.data["step"]: each.data["train_loss"] for each in events if each.data and "train_loss" in each.data}
    assert (first.metrics.train_loss, last.metrics.train_loss) == (losses[2], losses[4])
    for checkpoint in (first, last):
        name = checkpoint.fine_tuned_model_checkpoint
        answer = tuner.completions.create(model=name, prompt=PROMPT, max_tokens=2, temperature=0)
        assert answer.model == name and tuner.models.retrieve(name).parent == "tiny"
    trained = tuning.engine.adapter(finished.fine_tuned_model)
    assert_same(tuning.engine.adapter(last.fine_tuned_model_checkpoint), trained)
    early = tuning.engine.adapter(first.fine_tuned_model_checkpoint)
    assert not np.array_equal(early.weights["q_proj"][1], trained.weights["q_proj"][1])


def test_an_unloaded_model_comes_back_when_it_is_asked_for(tuning, tuner, finished):
    name = finished.fine_tuned_model
    before = tuning.engine.generate([PROMPT], GREEDY, name)[0].text
    body = {"lora_name": name}
    assert httpx.post(f"{tuning.url}/v1/unload_lora_adapter", json=body).status_code == 200
    assert name not in tuning.engine.adapters.named
    settings = {"max_tokens": 12, "temperature": 0, "extra_body": {"ignore_eos": True}}
    assert tuner.completions.create(model=name, prompt=PROMPT, **settings).choices[0].text == before


def test_a_model_takes_the_place_of_one_that_nobody_uses(tuning, tuner, finished):
    """There are 12 places, and all are taken."""
    engine, name = tuning.engine, finished.fine_tuned_model
    before = engine.generate([PROMPT], GREEDY, name)[0].text
    engine.unload_adapter(name)
    copies = [f"copy{number}" for number in range(12)]
    for copy in copies:
        engine.load_adapter(copy, tuning.service.folder.adapter(name))
        assert engine.generate([PROMPT], GREEDY, copy)[0].text == before
    settings = {"max_tokens": 12, "temperature": 0, "extra_body": {"ignore_eos": True}}
    assert tuner.completions.create(model=name, prompt=PROMPT, **settings).choices[0].text == before
    for copy in copies:
        engine.unload_adapter(copy)


def test_a_new_model_need_not_stay_in_memory(tuning, finished):
    """Its files were written when the job ended, and read back."""
    engine, name = tuning.engine, finished.fine_tuned_model
    version = engine.loop.call(engine.adapters.find, name)
    assert engine.library.host._kept[version.version].folder == tuning.service.folder.adapter(name)


def test_a_job_goes_on_from_a_model(tuning, tuner, rows, finished):
    start = finished.fine_tuned_model
    job = create(tuner, rows, {**SHORT, "max_steps": 1, "learning_rate": 0.0}, model=start)
    done = ended(tuner, job.id)
    assert tuning.service.trained.find(start)
    assert done.status == "succeeded" and done.model == start, done.error
    assert_same(tuning.engine.adapter(done.fine_tuned_model), tuning.engine.adapter(start))


def test_jobs_are_listed_in_pages(tuner, rows, finished):
    newest = create(tuner, rows, LONG).id
    tuner.fine_tuning.jobs.cancel(newest)
    jobs = list(tuner.fine_tuning.jobs.list(limit=1))
    assert [job.id for job in jobs] == [job.id for job in tuner.fine_tuning.jobs.list()]
    assert jobs[0].id == newest and finished in jobs and len({job.id for job in jobs}) == len(jobs)


@pytest.mark.parametrize(
    ("change", "param", "words"),
    [
        ({"training_file": "file-ghost"}, "training_file", "no uploaded file"),
        ({"validation_file": "../state.sqlite"}, "validation_file", "no uploaded file"),
        ({"model": "ghost"}, "model", "does not exist"),
        ({"suffix": "a/b"}, "suffix", "letters, digits"),
        ({"seed": -1}, "hyperparameters", "seed is -1"),
        ({"hyperparameters": {"n_epochs": 0}}, "hyperparameters", "hyperparameters: n_epochs is 0; it must be above 0"),
        ({"hyperparameters": {"learning_rate_multiplier": -1}}, "hyperparameters", "learning_rate_multiplier is -1.0"),
        ({"hyperparameters": {"n_epoch": 1}}, "hyperparameters", "did you mean 'n_epochs'"),
        ({"hyperparameters": {"rank": "x"}}, "rank", "whole number"),
        ({"hyperparameters": {"data": "/etc/passwd"}}, "hyperparameters", "unknown hyperparameter 'data'"),
        ({"hyperparameters": {"target_modules": ["embed"]}}, "hyperparameters", "target_modules"),
        ({"method": {"type": "dpo"}}, "method", "supervised"),
        ({"integrations": [{"type": "wandb"}]}, "integrations", "not supported"),
        ({"trainingfile": "x"}, "trainingfile", "did you mean 'training_file'"),
    ],
)
def test_what_is_wrong_is_named(tuning, rows, change, param, words):
    body = {"model": "tiny", "training_file": rows, **change}
    answer = httpx.post(f"{tuning.url}/v1/fine_tuning/jobs", json=body, timeout=20)
    error = answer.json()["error"]
    assert answer.status_code in (400, 404) and error["param"] == param and words in error["message"]


def test_unknown_jobs_are_not_found(tuner):
    jobs = tuner.fine_tuning.jobs
    for action in (jobs.retrieve, jobs.cancel, jobs.list_events, jobs.checkpoints.list):
        with pytest.raises(openai.NotFoundError, match="ftjob-ghost"):
            action("ftjob-ghost")
