"""/dashboard.json: against what is worked out by hand, what clients saw, and for owners beside one another."""

import asyncio
import json
from collections import deque
from concurrent.futures import Future
from types import SimpleNamespace

import httpx
import pytest

from flexjax.engine.metrics import IterationRecord
from flexjax.finetuning.job import FinetuneJob
from flexjax.scheduler.objectives import CoServe, FlatOut
from flexjax.scheduler.scheduler import Statistics
from flexjax.server.dashboard import latency, objective, pages
from flexjax.server.engine_view import MOST_RECORDS, SHOWN_ITERATIONS, EngineView
from flexjax.server.recent import Spread
from tests.server.conftest import HEADERS, wait_until
from tests.server.jobs import LONG, ROWS, SHORT, create, ended, jsonl, upload

BODY = {"model": "tiny", "temperature": 0, "extra_body": {"ignore_eos": True}}
COUNTS = {"running": 0, "waiting": 0, "prefix_hits": 0, "preemptions": 0}
IDLE = Statistics(pages=9, free_pages=5, cached_pages=3, available_pages=7, tape_pages=1, **COUNTS)


def numbers(server, owner: str | None = None) -> dict:
    answer = httpx.get(f"{server.url}/dashboard.json", headers=HEADERS.get(owner))
    assert answer.status_code == 200 and answer.headers["cache-control"] == "no-store"
    return answer.json()


def record(index: int, start: float, seconds: float, **values) -> IterationRecord:
    names = ("decode_slots", "prompt_slots", "finetune_slots", "loss_units", "backward_units", "updates")
    fields = {**dict.fromkeys(names, 0), "predicted": seconds, "limit": None, "inference_share": 1.0, **values}
    return IterationRecord(index=index, start=start, seconds=seconds, **fields)


SERVES = record(0, 0.0, 0.5, decode_slots=3, prompt_slots=1)
MIXED = record(1, 1.0, 0.8, decode_slots=1, finetune_slots=128, backward_units=5, inference_share=0.25, unit_share=0.5)
UNITS = record(2, 2.0, 0.6, backward_units=9, inference_share=0.0, unit_share=0.9, limit=0.7)


class Engine:
    """Answers at once, and counts how often it is asked."""

    def __init__(self, records):
        self.loop = SimpleNamespace(records=deque(records), started=1000.0, post=self.post)
        self.scheduler = SimpleNamespace(statistics=IDLE)
        table = SimpleNamespace(adapters=13, resident={3: SimpleNamespace(name="poet")})
        tier = SimpleNamespace(waiting=2, table=table)
        self.library = SimpleNamespace(tier=tier, host=SimpleNamespace(bytes=77))
        self.asked = 0

    def post(self, command, *arguments) -> Future:
        self.asked += 1
        future = Future()
        future.set_result(command(*arguments))
        return future


def test_iterations_are_divided_and_put_into_their_seconds():
    """By hand: 3 of 4 slots decode; a quarter is decoding's, half is the units'; without windows, units have it all."""
    view = EngineView(Engine([]))
    view.take([SERVES, MIXED, UNITS])
    spent = view.spent(1003.2)
    last = {name: values[-3:] for name, values in spent.items()}
    assert last == {
        "finetune_tokens": [0, 128, 0],
        "decode": [0.375, 0.2, 0.0],
        "prompt": [0.125, 0.0, 0.0],
        "forward": [0.0, 0.2, 0.0],
        "backward": [0.0, 0.4, 0.6],
    }
    assert {len(values) for values in spent.values()} == {60} and not any(spent["decode"][:-3])
    assert view.iterations()[1:] == [
        {"index": 1, "decode": 200, "prompt": 0, "forward": 200, "backward": 400, "limit": None, "backward_units": 5},
        {"index": 2, "decode": 0, "prompt": 0, "forward": 0, "backward": 600, "limit": 700, "backward_units": 9},
    ]


def test_the_engine_is_asked_for_what_is_new_and_not_by_everybody(monkeypatch):
    engine, clock = Engine([SERVES, MIXED]), [50.0]
    view = EngineView(engine)
    monkeypatch.setattr("flexjax.server.engine_view.time", SimpleNamespace(perf_counter=lambda: clock[0]))

    async def look() -> list[tuple[int, ...]]:
        found = [await view.look(), *await asyncio.gather(view.look(), view.look())]
        engine.loop.records.append(UNITS)
        clock[0] += 0.6
        found.append(await view.look())
        return [tuple(each.index for each in now.records) for now in found]

    assert asyncio.run(look()) == [(0, 1), (0, 1), (0, 1), (2,)] and engine.asked == 2
    assert [each["index"] for each in view.iterations()] == [0, 1, 2]


def test_a_late_look_takes_a_bounded_number():
    engine = Engine(record(index, 0.01 * index, 0.01) for index in range(MOST_RECORDS + 500))
    view = EngineView(engine)
    now = asyncio.run(view.look())
    assert [now.records[0].index, len(now.records)] == [500, MOST_RECORDS]
    assert [each["index"] for each in view.iterations()] == list(range(MOST_RECORDS + 500))[-SHOWN_ITERATIONS:]
    assert (now.unstarted, now.places, now.resident, now.host_bytes) == (2, 12, ("poet",), 77)


def test_pages_add_up():
    """Nine: five free and two kept ones make the seven that can be had; of the other two one is a tape's."""
    now = SimpleNamespace(statistics=IDLE)
    assert pages(now) == {"requests": 1, "tapes": 1, "cached": 2, "free": 5, "total": 9}


def test_latencies_are_milliseconds():
    spread = Spread()
    spread.observe(0.25, 3)
    assert latency([spread]) == {"p50": pytest.approx(250, rel=0.026), "p99": latency([spread])["p50"], "count": 3}
    assert latency([]) == {"p50": None, "p99": None, "count": 0}


@pytest.mark.parametrize(
    ("policy", "tpot", "itl", "shown"),
    [
        (FlatOut(), None, None, None),
        (CoServe(0.05, itl=0.07), 50.0, 70.0, 50.0),
        (CoServe(0.04), 50.0, None, 40.0),
        (CoServe(0.07, itl=0.07), None, 70.0, None),
        (CoServe(0.03, itl=0.07), None, 70.0, 30.0),
    ],
)
def test_the_objective_is_the_one_aimed_at(policy, tpot, itl, shown):
    """Which may have been changed since the configuration; one of gaps alone is none of a sequence's mean."""
    config = SimpleNamespace(tpot_objective_ms=tpot, itl_objective_ms=itl, ttft_objective_ms=None)
    engine = SimpleNamespace(config=config, scheduler=SimpleNamespace(policy=policy))
    assert objective(SimpleNamespace(engine=engine)) == {"ttft": None, "tpot": shown, "itl": itl}


def test_what_a_client_got_is_in_it(serving):
    """Two prompts, two answers each of five tokens: four first ones and four times four after them."""
    with serving() as server, server.client() as client:
        client.completions.create(prompt=[[1, 2, 3], [4, 5]], n=2, max_tokens=5, **BODY)
        wait_until(lambda: sum(numbers(server)["seconds"]["output_tokens"]) == 20)
        now = numbers(server)
    assert {name: each["count"] for name, each in now["latency"].items()} == {"ttft": 4, "tpot": 4, "itl": 16}
    assert all(0 < each["p50"] <= each["p99"] for each in now["latency"].values())
    assert now["requests"] == {"running": 0, "waiting": 0, "rows": 4} and now["jobs"] == []
    assert now["pages"]["total"] == 120 == sum(now["pages"].values()) - 120 and now["pages"]["requests"] == 0
    assert now["model"] == "tiny" and now["objective"] == {"ttft": None, "tpot": None, "itl": None}
    assert sum(each["bytes"] for each in now["memory"]) == server.engine.memory_plan.limit
    newest = server.engine.loop.records[-1]
    last = now["iterations"][-1]
    assert last["index"] == newest.index
    assert last["decode"] + last["prompt"] == pytest.approx(1e3 * newest.seconds, abs=0.01)


def test_rows_queue_and_pages_are_those_of_the_moment(server, client):
    with client.completions.create(prompt=[7], max_tokens=250, n=64, stream=True, **BODY) as stream:
        next(iter(stream))
        wait_until(lambda: numbers(server)["requests"]["running"] == 4)
        now = numbers(server)
    assert 0 < now["requests"]["waiting"] <= 60 and 4 <= now["pages"]["requests"] <= 16
    wait_until(lambda: numbers(server)["requests"] == {"running": 0, "waiting": 0, "rows": 4})


def events(client, job: str) -> list[dict]:
    found = client.fine_tuning.jobs.list_events(job, limit=100)
    return [event.data for event in found if event.type == "metrics"][::-1]


def test_a_jobs_curve_is_that_of_its_events(tuning, tuner, finished):
    told = events(tuner, finished.id)
    train = [[each["step"], each["train_loss"]] for each in told if "train_loss" in each]
    held_out = [[each["step"], each["valid_loss"]] for each in told if "valid_loss" in each]
    shown = next(each for each in numbers(tuning)["jobs"] if each["id"] == finished.id)
    assert len(train) == 4 and held_out, "of the job of these tests"
    assert shown["losses"] == {"train": train, "validation": held_out}
    assert (shown["status"], shown["step"], shown["total_steps"]) == ("succeeded", 4, 4)


def test_finetuning_is_counted_while_it_runs(tuning, tuner, rows):
    job = create(tuner, rows, LONG, suffix="long").id
    try:
        wait_until(lambda: sum(numbers(tuning)["seconds"]["finetune_tokens"]) > 0)
        wait_until(lambda: numbers(tuning)["jobs"][0]["step"] > 2)
        now = numbers(tuning)
        assert now["jobs"][0]["id"] == job and now["jobs"][0]["status"] == "running"
        assert sum(now["seconds"]["backward"]) > 0 and any(each["backward"] for each in now["iterations"])
    finally:
        tuner.fine_tuning.jobs.cancel(job)
    ended(tuner, job)


def test_owners_see_their_own_jobs_and_adapters(owned, people, tmp_path):
    """Of the configuration's job only the operator hears; its adapter is for everybody."""
    assert httpx.get(f"{owned.url}/dashboard.json").status_code == 401
    assert httpx.get(f"{owned.url}/").status_code == 200
    ann = people["ann"]
    job = ended(ann, create(ann, upload(ann, jsonl(ROWS)).id, SHORT, suffix="shown", seed=3).id)
    body = {"lora_name": "anns-own", "lora_path": "poet"}
    assert httpx.post(f"{owned.url}/v1/load_lora_adapter", json=body, headers=HEADERS["ann"]).status_code == 200
    (tmp_path / "rows.jsonl").write_bytes(jsonl(ROWS))
    settings = {"rank": 4, "target_modules": ("q_proj",), "epochs": 1, "batch_size": 4}
    house = owned.engine.finetune(FinetuneJob(name="house-job", data=str(tmp_path / "rows.jsonl"), **settings))
    try:
        assert house.wait(60) == "succeeded"
        seen = {owner: numbers(owned, owner) for owner in HEADERS}
    finally:
        body = {"lora_name": "anns-own"}
        httpx.post(f"{owned.url}/v1/unload_lora_adapter", json=body, headers=HEADERS["ann"])
        owned.engine.unload_adapter("house-job")
    jobs = {owner: {each["name"]: each for each in now["jobs"]} for owner, now in seen.items()}
    assert job.fine_tuned_model in jobs["ann"] and "house-job" not in jobs["ann"]
    assert jobs["bob"] == {} and job.fine_tuned_model not in jobs["operator"]
    shown = jobs["operator"]["house-job"]
    assert [loss for _, loss in shown["losses"]["train"]] == house.losses and shown["id"] is None
    names = {owner: now["adapters"]["names"] for owner, now in seen.items()}
    assert "house" in names["bob"] and "anns-own" in names["ann"] and job.fine_tuned_model in names["ann"]
    for owner in ("bob", "operator"):
        text = json.dumps({**seen[owner], "jobs": []})
        assert "anns-own" not in text and job.fine_tuned_model not in text and "\\u001f" not in text
    assert seen["ann"]["adapters"]["resident"] == seen["bob"]["adapters"]["resident"] >= len(names["ann"])
