"""Models that their owner deletes, and checkpoints that are not kept for ever."""

from concurrent.futures import ThreadPoolExecutor

import openai
import pytest

from flexjax.server.data_folder import DataFolder
from flexjax.server.job_request import JobRequest
from flexjax.server.prompts import BodyError
from flexjax.server.store import Store
from flexjax.server.trained_models import TrainedModels
from tests.server.conftest import halted_by_the_first_output, wait_until
from tests.server.jobs import FAST, LONG, PROMPT, ROWS, SHORT, create, ended, jsonl, upload

GREEDY = {"max_tokens": 12, "temperature": 0, "extra_body": {"ignore_eos": True}}


@pytest.fixture(scope="module")
def client(people):
    return people["ann"]


@pytest.fixture(scope="module")
def file(client) -> str:
    return upload(client, jsonl(ROWS)).id


@pytest.fixture
def job(client, file):
    done = ended(client, create(client, file, SHORT, seed=7).id)
    assert done.status == "succeeded", done.error
    return done


def names(client) -> set[str]:
    return {model.id for model in client.models.list()}


def absent(client, name: str) -> None:
    """Whatever it is asked for."""
    for act in (
        lambda: client.models.retrieve(name),
        lambda: client.models.delete(name),
        lambda: client.completions.create(model=name, prompt=PROMPT, **GREEDY),
    ):
        with pytest.raises(openai.NotFoundError) as caught:
            act()
        assert caught.value.code == "model_not_found"
    assert name not in names(client)


def test_a_deleted_model_is_gone_with_its_export_and_its_job_remains(owned, client, job, file):
    name = job.fine_tuned_model
    assert client.completions.create(model=name, prompt=PROMPT, **GREEDY).model == name
    kept = {each.fine_tuned_model_checkpoint for each in client.fine_tuning.jobs.checkpoints.list(job.id)}
    answer = client.models.delete(name)
    assert (answer.id, answer.object, answer.deleted) == (name, "model", True)
    absent(client, name)
    assert not owned.service.folder.adapter(name).exists()
    assert name not in owned.engine.adapters.named
    assert client.fine_tuning.jobs.retrieve(job.id) == job and kept <= names(client)
    assert client.files.content(job.result_files[0]).text.startswith("step,")
    with pytest.raises(openai.NotFoundError):
        create(client, file, SHORT, model=name)


def test_a_checkpoint_is_deleted_alone(owned, client, job):
    first = client.fine_tuning.jobs.checkpoints.list(job.id).data[-1]
    name = first.fine_tuned_model_checkpoint
    folder = owned.service.folder.checkpoint(job.id, first.step_number)
    assert client.completions.create(model=name, prompt=PROMPT, **GREEDY).model == name and folder.is_dir()
    assert client.models.delete(name).deleted
    absent(client, name)
    assert not folder.exists() and job.fine_tuned_model in names(client)
    assert name not in [each.fine_tuned_model_checkpoint for each in client.fine_tuning.jobs.checkpoints.list(job.id)]


def test_an_answer_under_way_is_finished_by_the_model_that_began_it(owned, client, job):
    """The engine stands still from the first token until the model is deleted in the database."""
    name, store = job.fine_tuned_model, owned.service.store
    whole = client.completions.create(model=name, prompt=PROMPT, **GREEDY).choices[0].text
    with ThreadPoolExecutor() as threads:
        with halted_by_the_first_output(owned):
            stream = client.completions.create(model=name, prompt=PROMPT, stream=True, **GREEDY)
            deleted = threads.submit(client.models.delete, name)
            wait_until(lambda: store.find("jobs", id=job.id)["deleted"] is not None)
        assert deleted.result().deleted
    assert "".join(chunk.choices[0].text for chunk in stream) == whole
    absent(client, name)


def test_only_models_of_jobs_that_have_ended_can_be_deleted(owned, client, job, file):
    for name in ("tiny", owned.engine.config.model):
        with pytest.raises(openai.BadRequestError, match="the base model, which cannot be deleted"):
            client.models.delete(name)
    engine = owned.engine
    engine.load_adapter("annex", owned.service.folder.adapter(job.fine_tuned_model))
    with pytest.raises(openai.BadRequestError, match="goes with unload_lora_adapter"):
        client.models.delete("annex")
    engine.unload_adapter("annex")
    running = create(client, file, LONG, model=job.fine_tuned_model)
    with pytest.raises(openai.BadRequestError, match=f"The job {running.id} starts from") as caught:
        client.models.delete(job.fine_tuned_model)
    assert caught.value.code == "model_in_use"
    row = owned.service.store.find("jobs", id=running.id)
    with pytest.raises(openai.BadRequestError, match=f"The job {running.id} is .*once it has ended"):
        client.models.delete(row["name"])
    assert client.fine_tuning.jobs.cancel(running.id).status == "cancelled"
    absent(client, row["name"])
    assert client.models.delete(job.fine_tuned_model).deleted


def test_a_job_starts_from_the_model_that_it_names_or_not_at_all(owned, file):
    """The model may have gone since the body was read."""
    given = {"validation_file": None, "suffix": "", "seed": 1, "hyperparameters": {}, "metadata": None}
    request = JobRequest(model="ft:ghost", training_file=file, **given)
    with pytest.raises(BodyError, match="the model ft:ghost is no longer there"):
        owned.service.keeper.create(request, "ann", "tiny")


def test_the_newest_checkpoints_are_kept(owned, client, file):
    steps = {**FAST, "batch_size": 4, "max_steps": 8, "checkpoint_every": 1}
    done = ended(client, create(client, file, steps, seed=2).id)
    listed = client.fine_tuning.jobs.checkpoints.list(done.id).data
    assert [each.step_number for each in listed] == [8, 7, 6]
    folders = owned.service.folder.checkpoints(done.id)
    assert [each.name for each in folders] == [f"step-{step:08d}" for step in (6, 7, 8)]
    assert {each.fine_tuned_model_checkpoint for each in listed} <= names(client)
    events = client.fine_tuning.jobs.list_events(done.id, limit=1000).data
    assert sum("Checkpoint created" in each.message for each in events) == 8


def test_what_was_deleted_before_a_kill_is_swept(tmp_path):
    """The rows are as a killed process leaves them: the model's is marked, the checkpoint's has gone."""
    store, folder = Store(tmp_path / "state.sqlite"), DataFolder(tmp_path)
    row = {"created": 1, "request": {"model": "tiny"}, "status": "succeeded", "trained_tokens": 1}
    store.add("jobs", id="a", name="ft:a", deleted=2, **row)
    store.add("jobs", id="b", name="ft:b", **row)
    store.add("checkpoints", id="c", created=1, job="b", name="ft:b:4", step=4, metrics={})
    gone = [folder.adapter("ft:a"), folder.checkpoint("b", 2)]
    kept = [folder.adapter("ft:b"), folder.checkpoint("b", 4), folder.adapter("mine"), tmp_path / "jobs" / "other"]
    for each in [*gone, *kept]:
        each.mkdir(parents=True)
    models = TrainedModels(None, store, folder)
    assert sorted(models.names("")) == ["ft:b", "ft:b:4"]
    folder.sweep(set(), models.left_over())
    assert not any(each.exists() for each in gone) and all(each.is_dir() for each in kept)
    store.close()
    folder.close()
