"""An engine with two places and seven adapters, each of which begins its answer with a token of its own: whoever is
answered by another's adapter shows it. What each should say comes from the float64 model."""

import queue
import random
import shutil

import numpy as np
import pytest

from flexjax.request import SamplingParams
from flexjax.weights.adapter import fresh_adapter
from flexjax.weights.peft import write_adapter
from tests.engine.conftest import job
from tests.ladder import Model
from tests.tiny_model import CONFIG

MODULES = ("q_proj", "down_proj")
PROMPT = list(b"who are you?")
GREEDY = SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True)
ADAPTERS = 7
SETTINGS = dict(max_adapters=2, adapter_rank_capacity=16)


def said_by(model: Model, pairs: dict) -> list[int]:
    """The three tokens of an adapter's answer, where the first is certain: no other comes near it."""
    tokens = list(PROMPT)
    for _ in range(GREEDY.max_tokens):
        logits = model.dense.logits(np.array(tokens), pairs, 2.0)[-1]
        below, best = np.sort(logits)[-2:]
        if best - below < 0.05:
            return []
        tokens.append(int(logits.argmax()))
    return tokens[len(PROMPT) :]


@pytest.fixture(scope="module")
def voices(tmp_path_factory) -> dict:
    """Folder of each adapter -> what it says; no two begin alike."""
    model, found, folder = Model.random(CONFIG), {}, tmp_path_factory.mktemp("voices")
    fresh = fresh_adapter(CONFIG, rank=4, alpha=8, target_modules=MODULES)
    for seed in range(100):
        pairs = model.factors(4, seed, MODULES)
        said = said_by(model, pairs)
        if said and said[0] not in [other[0] for other in found.values()]:
            write_adapter(folder / str(seed), fresh.with_weights({m: (pairs["a"][m], pairs["b"][m]) for m in MODULES}))
            found[folder / str(seed)] = said
        if len(found) == ADAPTERS:
            return found
    raise AssertionError("too few adapters differ in their first token")


def answer(listener: queue.SimpleQueue) -> list[int]:
    while (output := listener.get(timeout=60)).finish_reason is None:
        pass
    assert output.finish_reason == "length", output.error
    return output.token_ids


def test_every_answer_is_by_the_version_that_its_name_meant(new_engine, voices):
    """Names are loaded, replaced and unloaded between requests; a dictionary says what a name means. The host's memory
    has room for three, so that the others are read from their files again."""
    turn, folders, meaning, asked = random.Random(7), list(voices), {}, []
    nbytes = sum(file.stat().st_size for file in folders[0].iterdir())
    with new_engine(**SETTINGS, adapter_host_bytes=3 * nbytes) as engine:

        def load() -> None:
            name, folder = turn.choice("abcdefghij"), turn.choice(folders)
            turn.choice([engine.load_adapter, engine.register_adapter])(name, folder)
            meaning[name] = folder

        def unload() -> None:
            if len(meaning) > 3:
                engine.unload_adapter(name := turn.choice(sorted(meaning)))
                del meaning[name]

        def ask() -> None:
            name, listener = turn.choice(sorted(meaning)), queue.SimpleQueue()
            engine.submit(PROMPT, GREEDY, name, listener, turn.randrange(2))
            asked.append((meaning[name], listener))

        for _ in range(8):
            load()
        for _ in range(200):
            turn.choice([ask] * 6 + [load, unload])()
        for folder, listener in asked:
            assert answer(listener) == voices[folder]
        tier, table = engine.library.tier, engine.adapters
        assert tier.evictions > 5 and tier.loads > 5
        assert len(table.resident) <= 2  # fewer, where those that answered last had lost their names
        assert engine.library.host.bytes <= 3 * nbytes
        assert set(table.named) == set(meaning)
        engine.loop.call(engine.scheduler.check)
        assert all(version.pins == version.holds == 0 for version in table.resident.values())


def test_serving_goes_on_while_a_file_is_read_and_the_request_for_it_waits(new_engine, voices, monkeypatch):
    """The file is a slow one: it is read when the other requests have had their answers."""
    here, slow = list(voices)[:2]
    with new_engine(**SETTINGS) as engine:
        engine.load_adapter("here", here)
        engine.register_adapter("slow", slow)
        read, arrived = engine.library.host._read, queue.SimpleQueue()
        go_on = queue.SimpleQueue()
        monkeypatch.setattr(engine.library.host, "_read", lambda folder: (arrived.put(1), go_on.get(), read(folder))[2])
        waits = queue.SimpleQueue()
        engine.submit(PROMPT, GREEDY, "slow", waits)
        arrived.get(timeout=30)
        for _ in range(3):
            assert engine.generate([PROMPT], GREEDY, "here")[0].token_ids == voices[here]
        assert waits.empty()
        (cancelled,) = engine.submit(PROMPT, GREEDY, "slow", gone := queue.SimpleQueue())
        engine.cancel([cancelled])
        assert gone.get(timeout=30).finish_reason == "abort"
        go_on.put(1)
        assert answer(waits) == voices[slow]


def test_a_file_that_is_gone_ends_the_requests_for_it_and_no_others(new_engine, voices, tmp_path):
    folder = next(iter(voices))
    shutil.copytree(folder, tmp_path / "gone")
    with new_engine(**SETTINGS) as engine:
        engine.register_adapter("gone", tmp_path / "gone")
        engine.register_adapter("here", folder)
        shutil.rmtree(tmp_path / "gone")
        (lost,) = engine.generate([PROMPT], GREEDY, "gone")
        assert lost.finish_reason == "error" and "adapter_config.json" in lost.error and lost.token_ids == []
        assert engine.generate([PROMPT], GREEDY, "here")[0].token_ids == voices[folder]
        shutil.copytree(folder, tmp_path / "gone")
        assert engine.generate([PROMPT], GREEDY, "gone")[0].token_ids == voices[folder]


def test_a_trained_adapter_leaves_and_comes_back_as_it_was(new_engine, voices):
    first, second = list(voices)[:2]
    with new_engine(**SETTINGS) as engine:
        assert engine.finetune(job("trained")).wait(timeout=60) == "succeeded"
        before = engine.generate([PROMPT], GREEDY, "trained")[0].token_ids
        for name, folder in (("first", first), ("second", second)):
            engine.load_adapter(name, folder)
            assert engine.generate([PROMPT], GREEDY, name)[0].token_ids == voices[folder]
        assert "trained" not in [version.name for version in engine.adapters.resident.values()]
        assert engine.generate([PROMPT], GREEDY, "trained")[0].token_ids == before


def test_one_place_serves_one_after_another(new_engine, voices):
    """Each waits until the one before has ended, and nothing else happens then."""
    with new_engine(max_adapters=1, adapter_rank_capacity=8) as engine:
        listeners = []
        for number, folder in enumerate(list(voices)[:3]):
            engine.register_adapter(str(number), folder)
            listeners.append(queue.SimpleQueue())
            engine.submit(PROMPT, GREEDY, str(number), listeners[-1])
        for folder, listener in zip(voices, listeners, strict=False):
            assert answer(listener) == voices[folder]
