"""What one owner may take up at a time: each limit is reached and not passed, and leaves room for others."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest

from flexjax.fields import ConfigError
from flexjax.server.admission import Admission
from flexjax.server.config import ServerConfig
from flexjax.server.errors import ApiError
from flexjax.server.keys import read_keys
from flexjax.server.limits import Limits
from flexjax.server.store import Store
from tests.server.conftest import halted, wait_until
from tests.server.jobs import FAST, LONG, ROWS, create, jsonl, upload

BODY = {"model": "tiny", "prompt": "a", "max_tokens": 2, "temperature": 0, "extra_body": {"ignore_eos": True}}


@pytest.fixture
def keys(tmp_path) -> dict:
    (tmp_path / "keys").write_text("ann sk-ann\nann sk-ann2\nbob sk-bob\n")
    return {"api_keys": ("sk-op",), "api_keys_file": str(tmp_path / "keys")}


def client_of(server, key: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0)


def refusal(act, *arguments) -> ApiError:
    with pytest.raises(ApiError) as caught:
        act(*arguments)
    return caught.value


# sequences


def test_an_owner_cannot_fill_the_queue():
    """Two rows and a queue of four; ann may have three, bob as many as there are."""
    admission = Admission(2, 4, {"ann": 3, "bob": 0}.get)
    admission.enter("ann")
    admission.widen("ann", 3)
    error = refusal(admission.enter, "ann")
    assert (error.status, error.code, error.headers["Retry-After"]) == (429, "overloaded", "1")
    assert str(error).startswith("You have 3 sequences in hand, and your max_sequences is 3; try again later")
    error = refusal(admission.widen, "ann", 4)
    assert error.status == 400 and "asks for 4 sequences; your max_sequences allows 3" in str(error)
    admission.enter("bob")
    admission.widen("bob", 3)
    error = refusal(admission.enter, "bob")
    assert error.status == 429 and str(error).startswith("The server has 6 sequences in hand, and max_queue is 4")
    admission.leave("ann", 2)
    assert admission.open == 4
    admission.enter("ann")
    admission.enter("ann")
    assert refusal(admission.enter, "ann").status == 429, "ann has three again"


def test_threads_of_an_owner_do_not_get_more_than_it_may_have():
    admission, let_in = Admission(1000, 1000, lambda owner: 50), []

    def enter() -> None:
        for _ in range(40):
            try:
                admission.enter("ann")
                let_in.append(1)
            except ApiError:
                continue

    threads = [threading.Thread(target=enter) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(let_in) == admission.open == 50


def test_a_full_owner_waits_and_the_others_are_served(serving, engine, keys):
    """Both of ann's keys count together. The engine stands still until the refusals have come."""

    async def ask(client, count: int) -> list:
        tasks = [asyncio.create_task(client.completions.create(**BODY)) for _ in range(count)]
        return await asyncio.gather(*tasks, return_exceptions=True)

    async def flood(server):
        settings = {"base_url": f"{server.url}/v1", "max_retries": 0}
        people = [openai.AsyncOpenAI(api_key=key, **settings) for key in ("sk-ann", "sk-ann2", "sk-bob")]
        with halted(engine):
            waiting = asyncio.create_task(ask(people[0], 6))
            while server.service.admission.open < 6:
                await asyncio.sleep(0.01)
            refused = await ask(people[1], 3)
            others = asyncio.create_task(ask(people[2], 8))
            while server.service.admission.open < 14:
                await asyncio.sleep(0.01)
        answers = await waiting + await others + await ask(people[1], 6)
        for each in people:
            await each.close()
        return answers, refused

    with serving(max_queue=20, owners={"ann": {"max_sequences": 6}}, **keys) as server:
        answers, refused = asyncio.run(flood(server))
        assert [answer.usage.completion_tokens for answer in answers] == [2] * 20
        assert {(type(each), each.code) for each in refused} == {(openai.RateLimitError, "overloaded")}
        with client_of(server, "sk-ann") as ann:
            with pytest.raises(openai.BadRequestError, match="asks for 7 sequences; your max_sequences allows 6"):
                ann.completions.create(**BODY | {"n": 7})
            with pytest.raises(openai.NotFoundError):
                ann.completions.create(**BODY | {"model": "ghost"})
        assert server.service.admission.open == 0 and not any(server.service.admission._owned.values())


# priority


def test_a_priority_is_not_better_than_its_owner_may_have(serving, engine, keys, monkeypatch):
    asked, submit = [], engine.submit_soon
    monkeypatch.setattr(engine, "submit_soon", lambda each: asked.append(each[0].priority) or submit(each))
    owners = {"ann": {"best_priority": 5}, "bob": {"best_priority": -2}}
    with serving(owners=owners, **keys) as server:

        def ask(key: str, **fields) -> None:
            with client_of(server, key) as client:
                client.completions.create(**BODY | {"extra_body": fields})

        for key, limit, refused in (("sk-ann", 5, (4, 0, -1)), ("sk-bob", -2, (-3, -(10**30)))):
            for priority in refused:
                with pytest.raises(openai.PermissionDeniedError) as caught:
                    ask(key, priority=priority)
                message = f"priority is {priority}; the smallest that you may ask for is {limit}, your best_priority"
                assert message in str(caught.value) and caught.value.code == "priority_not_allowed"
                assert caught.value.body["param"] == "priority"
        for key, priority in (("sk-ann", 5), ("sk-ann", 6), ("sk-bob", -2), ("sk-op", -9)):
            ask(key, priority=priority)
        for key in ("sk-ann", "sk-bob", "sk-op"):
            ask(key)
        ask("sk-ann", priority=None)
        assert asked == [5, 6, -2, -9, 5, 0, 0, 5] and server.service.admission.open == 0


# jobs


def test_unfinished_jobs_are_counted(tuning, tuner, monkeypatch):
    """Of eight at a time, two; and another when one has ended."""
    service, file = tuning.service, upload(tuner, jsonl(ROWS)).id
    before = len([job for job in tuner.fine_tuning.jobs.list() if job.status in ("queued", "running", "paused")])
    assert before == 0, "jobs of other tests"
    limits = Limits(ServerConfig(max_unfinished_jobs=2), service.store)
    monkeypatch.setattr(service, "limits", limits)
    patient = tuner.with_options(max_retries=0)

    def attempt(_) -> object:
        try:
            return create(patient, file, LONG).id
        except openai.RateLimitError as error:
            return error

    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(attempt, range(8)))
    jobs, refused = [[each for each in found if isinstance(each, kind)] for kind in (str, openai.RateLimitError)]
    try:
        assert len(jobs) == 2 and {(each.code, each.response.headers["retry-after"]) for each in refused} == {
            ("too_many_jobs", "60")
        }
        assert "You have 2 jobs that have not ended, and your max_unfinished_jobs is 2" in str(refused[0])
        wait_until(lambda: tuner.fine_tuning.jobs.retrieve(jobs[0]).status == "running")
        tuner.fine_tuning.jobs.pause(jobs[0])
        assert isinstance(attempt(0), openai.RateLimitError), "a paused job has not ended"
        tuner.fine_tuning.jobs.cancel(jobs[0])
        jobs.append(attempt(0))
        assert isinstance(jobs[-1], str) and isinstance(attempt(0), openai.RateLimitError)
    finally:
        for job in jobs[1:]:
            wait_until(lambda: tuner.fine_tuning.jobs.retrieve(job).status != "validating_files")  # noqa: B023
            tuner.fine_tuning.jobs.cancel(job)


def test_a_job_weighs_no_more_than_its_owner_may_have_it_weigh(tuning, tuner, monkeypatch):
    service, file = tuning.service, upload(tuner, jsonl(ROWS)).id
    short = {**FAST, "max_steps": 1}
    weight = lambda most, **given: create_and_cancel(tuning, tuner, monkeypatch, most, file, {**short, **given})
    assert weight(0.5) == 0.5 and weight(0.5, weight=0.25) == 0.25 and weight(2.0, weight=2.0) == 2.0
    assert weight(2.0) == weight(0.0) == 1.0 and weight(0.0, weight=9.0) == 9.0
    monkeypatch.setattr(service, "limits", Limits(ServerConfig(max_job_weight=0.5), service.store))
    with pytest.raises(openai.PermissionDeniedError) as caught:
        create(tuner, file, {**short, "weight": 0.6})
    assert "weight is 0.6; the largest that you may ask for is 0.5, your max_job_weight" in str(caught.value)
    assert caught.value.code == "weight_not_allowed"


def create_and_cancel(tuning, tuner, monkeypatch, most: float, file: str, hyperparameters: dict) -> float:
    """What a job weighs in the engine."""
    monkeypatch.setattr(tuning.service, "limits", Limits(ServerConfig(max_job_weight=most), tuning.service.store))
    name = f"ft:tiny:flexjax::{create(tuner, file, hyperparameters).id[-8:]}"
    wait_until(lambda: name in tuning.engine.trainer.jobs and tuning.engine.trainer.jobs[name].run.status.final)
    return tuning.engine.trainer.jobs[name].run.job.weight


# files


def test_files_of_an_owner_have_no_more_bytes_than_it_may_have(serving, keys):
    row = jsonl(ROWS[:1])
    with serving(max_total_file_bytes=3 * len(row) + 1, owners={"bob": {"max_total_file_bytes": 0}}, **keys) as server:
        ann, bob = client_of(server, "sk-ann"), client_of(server, "sk-bob")

        def attempt(_) -> object:
            try:
                return upload(ann, row).id
            except openai.PermissionDeniedError as error:
                return error

        with ThreadPoolExecutor(6) as threads:
            found = list(threads.map(attempt, range(6)))
        kept, refused = [[each for each in found if isinstance(each, kind)] for kind in (str, openai.APIError)]
        assert len(kept) == 3 and {each.code for each in refused} == {"no_room_for_files"}
        used = f"The file has {len(row)} bytes, and your files have {3 * len(row)}"
        assert f"{used}; your max_total_file_bytes is {3 * len(row) + 1}" in str(attempt(0))
        assert sorted(each.id for each in ann.files.list()) == sorted(kept)
        on_disk = {file.name for file in (server.service.folder.root / "files").iterdir()}
        assert on_disk == set(kept), "a refused file stays"
        assert len([upload(bob, row) for _ in range(5)]) == 5
        ann.files.delete(kept[0])
        assert isinstance(attempt(0), str) and isinstance(attempt(0), openai.PermissionDeniedError)
        ann.close(), bob.close()


def test_results_of_jobs_count_and_are_kept_all_the_same(tmp_path):
    store = Store(tmp_path / "state.sqlite")
    limits = Limits(ServerConfig(max_total_file_bytes=10), store)
    row = {"created": 1, "filename": "a", "rows": 1}
    for number, (owner, size) in enumerate((("ann", 4), ("ann", 5), ("bob", 100))):
        store.add("files", id=str(number), owner=owner, bytes=size, purpose="fine-tune-results", **row)
    limits.require_file_room("ann", 1)
    for owner, nbytes in (("ann", 2), ("bob", 0)):
        assert refusal(limits.require_file_room, owner, nbytes).status == 403
    limits.require_file_room("eve", 10)
    store.close()


# configuration


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_sequences": -1}, "max_sequences is -1; it must be at least 0"),
        ({"max_unfinished_jobs": "x"}, "max_unfinished_jobs is 'x'; it must be a whole number"),
        ({"max_job_weight": -0.5}, "max_job_weight is -0.5"),
        ({"best_priority": 1.5}, "best_priority is 1.5"),
        ({"owners": {"ann": {"max_sequence": 1}}}, "owners.ann: unknown key 'max_sequence' .*'max_sequences'"),
        ({"owners": {"ann": {"max_total_file_bytes": -1}}}, "owners.ann: max_total_file_bytes is -1"),
        ({"owners": {"ann": 3}}, "owners.ann is 3; it must be a table"),
        ({"owners": {"ane": {}}}, "owners.ane: api_keys_file has no key of an owner 'ane' .did you mean 'ann'"),
    ],
)
def test_mistakes_in_limits_are_named(keys, settings, message):
    with pytest.raises(ConfigError, match=message):
        read_keys(ServerConfig(**keys, **settings))


def test_an_owners_table_wins_over_what_all_have(tmp_path):
    store = Store(tmp_path / "state.sqlite")
    config = ServerConfig(max_sequences=4, best_priority=0, owners={"ann": {"max_sequences": 0, "best_priority": -1}})
    limits = Limits(config, store)
    assert [limits.sequences(owner) for owner in ("ann", "bob", "")] == [0, 4, 4]
    assert limits.priority("ann", -1) == -1 and refusal(limits.priority, "bob", -1).status == 403
    assert limits.of("ann").max_unfinished_jobs == 0
    store.close()


def test_without_limits_everything_goes(serving):
    with serving() as server:
        fields = {"model": "tiny", "prompt": "a", "max_tokens": 1, "priority": -(10**6)}
        assert httpx.post(f"{server.url}/v1/completions", json=fields, timeout=30).status_code == 200
