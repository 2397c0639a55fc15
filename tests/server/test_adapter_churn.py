"""Adapters are loaded, replaced and unloaded while clients ask for them, some of whom go away: sixteen names, twelve
places. An answer is by what its name meant at some moment between question and answer."""

import random
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import httpx

from flexjax.request import SamplingParams
from tests.server.conftest import ADAPTERS, wait_until
from tests.server.fault_record import TRIES, note
from tests.server.test_monitoring import samples

NAMES = [f"churned{number}" for number in range(16)]
BODY = {"prompt": "hello there", "max_tokens": 8, "temperature": 0, "ignore_eos": True}
CHANGES = 80 * TRIES
CLIENTS = 4


@dataclass
class Meanings:
    """What names meant when.

    Attributes:
        changes: name -> (begun, ended, folder or None for unloaded), in order; a change that has not ended has no end.
    """

    changes: dict[str, list] = field(default_factory=lambda: {name: [[0.0, 0.0, None]] for name in NAMES})

    def between(self, name: str, start: float, end: float) -> set[str | None]:
        """All that a name can have meant in this time."""
        changes = list(self.changes[name])
        before = [folder for _, ended, folder in changes if ended is not None and ended <= start]
        during = [folder for begun, ended, folder in changes if begun < end and (ended is None or ended > start)]
        return {before[-1], *during}


def churn(client: httpx.Client, meanings: Meanings, turn: random.Random) -> None:
    for _ in range(CHANGES):
        name = turn.choice(NAMES)
        folder = turn.choice([*ADAPTERS] * 4 + [None])
        change = [time.monotonic(), None, folder]
        meanings.changes[name].append(change)
        body = {"lora_name": name} if folder is None else {"lora_name": name, "lora_path": folder}
        path = f"/v1/{'unload' if folder is None else 'load'}_lora_adapter"
        status = client.post(path, json=body).status_code
        change[1] = time.monotonic()
        assert status == 200 or (status == 404 and folder is None)


def ask(client: httpx.Client, meanings: Meanings, turn: random.Random, voices: dict, over: threading.Event) -> Counter:
    """Ask until the changes are over; how the requests ended."""
    ends = Counter()
    while not over.is_set():
        name, start = turn.choice(NAMES), time.monotonic()
        if turn.random() < 0.2:
            with client.stream("POST", "/v1/completions", json=BODY | {"model": name, "stream": True}) as stream:
                next(stream.iter_raw(), None)
            ends["went away"] += 1
            continue
        answer = client.post("/v1/completions", json=BODY | {"model": name})
        meant = meanings.between(name, start, time.monotonic())
        if answer.status_code == 404:
            assert None in meant, f"{name} was loaded all the time"
        else:
            said = answer.json()["choices"][0]["text"]
            assert voices[said] in meant, f"{name} meant {meant} and spoke as {voices[said]}"
        ends[answer.status_code] += 1
    return ends


def test_every_answer_is_by_what_its_name_meant(serving, engine, adapter_dir):
    greedy, voices = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True), {}
    for name in ADAPTERS:
        engine.load_adapter(name, adapter_dir / name)
        voices[engine.generate([BODY["prompt"]], greedy, name)[0].text] = name
        engine.unload_adapter(name)
    assert len(voices) == len(ADAPTERS)
    turn, meanings, over = random.Random(3), Meanings(), threading.Event()
    with serving() as server, ThreadPoolExecutor(CLIENTS) as threads:
        clients = [httpx.Client(base_url=server.url, timeout=60) for _ in range(CLIENTS + 1)]
        before = samples(server)
        asked = [
            threads.submit(ask, client, meanings, random.Random(turn.random()), voices, over) for client in clients[1:]
        ]
        try:
            churn(clients[0], meanings, turn)
        finally:
            over.set()
        ends = sum((each.result() for each in asked), Counter())
        now = samples(server)
        for name in NAMES:
            clients[0].post("/v1/unload_lora_adapter", json={"lora_name": name})
        for client in clients:
            client.close()
        wait_until(lambda: server.service.admission.open == 0)
    assert ends[200] > 20 and set(ends) <= {200, 404, "went away"}
    evictions = now["flexjax:adapter_evictions_total",] - before["flexjax:adapter_evictions_total",]
    figures = {"answered": ends[200], "unknown": ends[404], "went_away": ends["went away"]}
    note("adapter churn", changes=CHANGES, **figures, evictions=int(evictions), wrong=0)
