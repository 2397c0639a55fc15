"""A server is killed at seeded moments of a job and of traffic, and as soon as a client sees the milestones of a job's
life. What it had acknowledged is there afterwards, once; the job's adapter is to the byte that of a job nobody killed;
and every answer was the right one."""

import random
import signal
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import httpx
import openai
import pytest

from flexjax.weights.adapter import fresh_adapter
from flexjax.weights.peft import write_adapter
from tests.server.conftest import MODULES, factors
from tests.server.fault_record import TRIES, note
from tests.server.jobs import FAST, PROMPT, ROWS, create, ended, jsonl, upload
from tests.server.processes import adapter_bytes, served, write_config
from tests.tiny_model import CONFIG

MOMENTS = 2
STEPS, EVERY = 240, 20
JOB = {**FAST, "batch_size": 4, "max_steps": STEPS, "checkpoint_every": EVERY, "schedule": "constant"}
ANSWER = {"prompt": PROMPT, "max_tokens": 6, "temperature": 0, "extra_body": {"ignore_eos": True}}
PLACES = {"max_adapters": 3, "adapter_rank_capacity": 24}
"""Fewer than checkpoints that are asked for."""

VOICES = {f"voice{seed}": seed for seed in (1, 2, 3)}
"""Folders of adapters that clients load, each with an answer of its own, and the seeds of their weights."""

CLIENTS = 2
NAMES = [[f"own{client}{letter}" for letter in "ab"] for client in range(CLIENTS)]
"""What each client calls the adapters that it loads; it alone knows what they mean."""


def checkpoints_of(client, job: str) -> list:
    return list(client.fine_tuning.jobs.checkpoints.list(job))


def events_of(client, job: str) -> list:
    return list(client.fine_tuning.jobs.list_events(job, limit=1000))


def said(client, model: str, **settings) -> str:
    return client.completions.create(model=model, **ANSWER, **settings).choices[0].text


@dataclass
class Whole:
    """What comes of the job when nobody kills it.

    Attributes:
        adapter: bytes of its file.
        answers: of the base model (step 0) and of each checkpoint, by its step.
        voices: answers of adapters that clients load, by their folders.
    """

    adapter: bytes
    answers: dict[int, str]
    voices: dict[str, str]


def write_voices(config: Path) -> None:
    fresh = fresh_adapter(CONFIG, rank=4, alpha=8, target_modules=MODULES)
    for name, seed in VOICES.items():
        pairs, folder = factors(seed), config.with_name("data") / "adapters" / name
        write_adapter(folder, fresh.with_weights({m: (pairs["a"][m], pairs["b"][m]) for m in MODULES}))


def change_adapter(client, name: str, folder: str | None) -> None:
    """Load it from a folder, or unload it."""
    body = {"lora_name": name} if folder is None else {"lora_name": name, "lora_path": folder}
    client.post(f"/{'unload' if folder is None else 'load'}_lora_adapter", body=body, cast_to=httpx.Response)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, compilation_cache) -> Whole:
    config, voices = write_config(tmp_path_factory.mktemp("whole"), compilation_cache, **PLACES), {}
    write_voices(config)
    with served(config) as (_, client):
        for folder in VOICES:
            change_adapter(client, "own", folder)
            voices[folder] = said(client, "own")
        done = ended(client, create(client, upload(client, jsonl(ROWS)).id, JOB, seed=5).id)
        assert done.status == "succeeded", done.error
        models = {each.step_number: each.fine_tuned_model_checkpoint for each in checkpoints_of(client, done.id)}
        answers = {step: said(client, model) for step, model in {**models, 0: "tiny"}.items()}
    assert len(set(answers.values())) > 3, "checkpoints cannot be told apart by their answers"
    assert len({answers[0], *voices.values()}) == len(VOICES) + 1, "adapters cannot be told apart by their answers"
    return Whole(adapter_bytes(config, done.fine_tuned_model), answers, voices)


@dataclass
class Ledger:
    """What the server has acknowledged, and how requests ended.

    Attributes:
        seen: job -> its events and checkpoints, by identifier.
        ends: of requests: "answered", a refusal's status, or "cut" where the connection broke.
        wrong: answers that are not those of the model asked for.
        meanings: what a name of a client's may mean: a folder, or None for nothing. There are two only where a change
            was not acknowledged.
        changes: of them that were acknowledged.
    """

    whole: Whole
    job: str = ""
    files: list[str] = field(default_factory=list)
    deleted: set[str] = field(default_factory=set)
    events: dict[str, object] = field(default_factory=dict)
    checkpoints: dict[str, object] = field(default_factory=dict)
    ends: Counter = field(default_factory=Counter)
    wrong: list = field(default_factory=list)
    meanings: dict[str, set] = field(default_factory=lambda: {name: {None} for names in NAMES for name in names})
    changes: int = 0

    def ask(self, client, turn: random.Random) -> None:
        """The base model or a checkpoint, streamed or not."""
        models = {0: "tiny"} | {each.step_number: each.fine_tuned_model_checkpoint for each in self.known()}
        step = turn.choice(sorted(models))
        if turn.random() < 0.5:
            text = said(client, models[step])
        else:
            chunks = client.completions.create(model=models[step], stream=True, **ANSWER)
            text = "".join(chunk.choices[0].text for chunk in chunks if chunk.choices)
            if len(text) < len(self.whole.answers[step]):
                raise openai.APIConnectionError(request=None)  # a stream that was cut ends early
        self.ends["answered"] += 1
        if text != self.whole.answers[step]:
            self.wrong.append((step, text))

    def known(self) -> list:
        return list(self.checkpoints.values())

    def upload(self, client, turn: random.Random) -> None:
        self.files.append(upload(client, jsonl(ROWS[: turn.randint(1, 8)])).id)

    def delete(self, client, turn: random.Random) -> None:
        if len(self.files) > 2:
            client.files.delete(file := turn.choice(self.files[1:]))
            self.deleted.add(file)
            self.files.remove(file)

    def change(self, client, turn: random.Random, names: list[str]) -> None:
        """Load, replace or unload an adapter."""
        name, folder = turn.choice(names), turn.choice([*VOICES, None])
        before, self.meanings[name] = self.meanings[name], self.meanings[name] | {folder}
        try:
            change_adapter(client, name, folder)
        except openai.APIStatusError as refusal:
            assert refusal.status_code != 404 or (folder is None and None in before)
            self.meanings[name] = before if refusal.status_code != 404 else {None}
        else:
            self.meanings[name] = {folder}
            self.changes += 1

    def hear(self, client, name: str) -> None:
        """What a client's adapter says must be what its name may mean; then that is what it means."""
        try:
            text = said(client, name)
        except openai.NotFoundError:
            found = {None}
        else:
            found = {folder for folder, voice in self.whole.voices.items() if voice == text}
        if not found & self.meanings[name]:
            self.wrong.append((name, found, self.meanings[name]))
        self.meanings[name] = found

    def look(self, client, _: random.Random) -> None:
        self.events.update({each.id: each for each in events_of(client, self.job)})
        self.checkpoints.update({each.id: each for each in checkpoints_of(client, self.job)})

    def check(self, client) -> None:
        """Everything is there once, as it was told."""
        files = Counter(file.id for file in client.files.list())
        assert set(self.files) <= set(files) and not self.deleted & set(files) and set(files.values()) <= {1}
        for told, listed in ((self.events, events_of), (self.checkpoints, checkpoints_of)):
            found = listed(client, self.job)
            assert len({each.id for each in found}) == len(found)
            kept = {each.id: each for each in found}
            assert all(kept.get(identifier) == each for identifier, each in told.items())
        assert [job.id for job in client.fine_tuning.jobs.list()] == [self.job]
        models = Counter(model.id for model in client.models.list())
        for name in self.meanings:
            self.hear(client, name)
            assert models[name] == (self.meanings[name] != {None})


def traffic(ledger: Ledger, client, turn: random.Random, names: list[str], dead: threading.Event) -> None:
    """One client after another until the server is dead. Who is in the middle of a deletion then may not know whether
    it happened, so that deletions are only told when they are acknowledged, and no file is deleted twice."""
    change, hear = partial(ledger.change, names=names), lambda client, turn: ledger.hear(client, turn.choice(names))
    acts = [ledger.ask] * 6 + [ledger.upload] * 2 + [ledger.look] * 2 + [change] * 2 + [hear] * 2
    while not dead.is_set():
        try:
            turn.choice(acts)(client, turn)
        except openai.APIConnectionError:
            ledger.ends["cut"] += 1
            return
        except openai.APIStatusError as refusal:
            ledger.ends[str(refusal.status_code)] += 1
        except openai.APIError:  # a stream's last event says that it failed
            ledger.ends["failed"] += 1


def live(ledger: Ledger, process, client, turn: random.Random, seconds: float) -> None:
    """Two clients for so long; then the server is killed."""
    dead, patient = threading.Event(), client.with_options(max_retries=0)
    threads = [
        threading.Thread(target=traffic, args=(ledger, patient, random.Random(turn.random()), names, dead))
        for names in NAMES
    ]
    for thread in threads:
        thread.start()
    time.sleep(seconds)
    process.send_signal(signal.SIGKILL)
    process.wait()
    dead.set()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "a request was neither answered nor refused"


def check_end(ledger: Ledger, config) -> None:
    """The last server brings the job to its end, as if nothing had happened."""
    with served(config) as (_, client):
        ledger.check(client)
        done = ended(client, ledger.job)
        assert done.status == "succeeded", done.error
        ledger.check(client)
        assert steps_in(events_of(client, done.id)) == list(range(1, STEPS + 1))
        assert [each.step_number for each in checkpoints_of(client, done.id)] == list(range(STEPS, 0, -EVERY))
        assert said(client, done.fine_tuned_model) == ledger.whole.answers[STEPS]
    assert adapter_bytes(config, done.fine_tuned_model) == ledger.whole.adapter


def steps_in(events) -> list[int]:
    return sorted(event.data["step"] for event in events if "train_loss" in (event.data or {}))


@pytest.mark.parametrize("seed", range(TRIES))
def test_a_server_that_is_killed_at_any_moment_forgets_nothing(seed, whole, tmp_path, compilation_cache):
    turn, ledger, config = random.Random(seed), Ledger(whole), write_config(tmp_path, compilation_cache, **PLACES)
    write_voices(config)
    for moment in range(MOMENTS):
        with served(config) as (process, client):
            if moment == 0:
                ledger.files.append(upload(client, jsonl(ROWS)).id)
                ledger.job = create(client, ledger.files[0], JOB, seed=5).id
            ledger.check(client)
            ledger.delete(client, turn)
            seconds = turn.uniform(0.0, 3.0)
            live(ledger, process, client, turn, seconds)
    check_end(ledger, config)
    assert not ledger.wrong and set(ledger.ends) <= {"answered", "cut", "429", "503"}
    told = {"events": len(ledger.events), "checkpoints": len(ledger.checkpoints), "files": len(ledger.files)}
    told["adapter_changes"] = ledger.changes
    note("kill", seed=seed, moments=MOMENTS, **told, answered=ledger.ends["answered"], cut=ledger.ends["cut"])


def newest_events(client, job: str) -> list:
    return client.fine_tuning.jobs.list_events(job, limit=20).data


def reached_step(step: int):
    return lambda client, job: any(each >= step for each in steps_in(newest_events(client, job)))


def reached_checkpoint(step: int):
    return lambda client, job: any(each.step_number >= step for each in checkpoints_of(client, job))


MILESTONES = {
    "it has begun": lambda client, job: client.fine_tuning.jobs.retrieve(job).status == "running",
    "the first step": reached_step(1),
    "the first checkpoint": reached_checkpoint(EVERY),
    "the last step": reached_step(STEPS),
    "the last checkpoint": reached_checkpoint(STEPS),
    "the end": lambda client, job: client.fine_tuning.jobs.retrieve(job).status == "succeeded",
}
"""Of a job's life, in their order."""

TRIED = tuple(MILESTONES) if TRIES > 1 else ("the last step", "the end")
"""In `make test` those about its end, which the moments above hardly ever meet."""

HESITATION = 0.03
"""Most seconds between the sight and the kill, but the first time."""


@pytest.mark.parametrize("seed", range(-(-TRIES // 3)))
def test_a_server_that_is_killed_at_each_milestone_of_its_job_forgets_nothing(seed, whole, tmp_path, compilation_cache):
    turn, ledger, config = random.Random(seed), Ledger(whole), write_config(tmp_path, compilation_cache, **PLACES)
    for milestone in TRIED:
        with served(config) as (process, client):
            if not ledger.job:
                ledger.files.append(upload(client, jsonl(ROWS)).id)
                ledger.job = create(client, ledger.files[0], JOB, seed=5).id
            deadline = time.monotonic() + 120
            while not MILESTONES[milestone](client, ledger.job):
                job = client.fine_tuning.jobs.retrieve(ledger.job)
                assert time.monotonic() < deadline and job.status not in ("failed", "cancelled"), (milestone, job)
                ledger.look(client, turn)
            time.sleep(turn.uniform(0, HESITATION) if seed else 0.0)
            process.send_signal(signal.SIGKILL)
            process.wait()
    check_end(ledger, config)
    told = {"events": len(ledger.events), "checkpoints": len(ledger.checkpoints), "files": len(ledger.files)}
    note("kill", seed=seed, moments=len(TRIED), **told, answered=0, cut=0)
