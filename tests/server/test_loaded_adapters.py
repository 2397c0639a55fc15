"""Adapters that clients have loaded are there in the next process, as they were loaded or not at all.

A process is followed by another on the same engine, from which everything has been unloaded: tests/server/test_kill.py
has real ones.
"""

import json
import shutil
import sqlite3
from contextlib import contextmanager
from pathlib import Path

import httpx
import openai
import pytest

from flexjax.engine.loop import EngineStopped
from flexjax.finetuning.job import FinetuneJob
from flexjax.request import SamplingParams
from flexjax.server.config import ServerConfig
from tests.server.conftest import Running
from tests.server.jobs import FAST, ROWS
from tests.server.test_full_disk import database_full

PROMPT = "hello there"
GREEDY = {"prompt": PROMPT, "max_tokens": 12, "temperature": 0, "extra_body": {"ignore_eos": True}}


@pytest.fixture(scope="module")
def voices(engine, adapter_dir) -> dict[str, str]:
    """What each folder's adapter answers, loaded by the engine itself."""
    settings, said = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True), {}
    for name in ("poet", "painter"):
        engine.load_adapter("voice", adapter_dir / name)
        said[name] = engine.generate([PROMPT], settings, "voice")[0].text
    engine.unload_adapter("voice")
    said["tiny"] = engine.generate([PROMPT], settings)[0].text
    assert len(set(said.values())) == 3
    return said


@pytest.fixture
def folder(adapter_dir, tmp_path) -> Path:
    """An adapter folder of the test's own."""
    for name in ("poet", "painter"):
        shutil.copytree(adapter_dir / name, tmp_path / "adapters" / name)
    return tmp_path / "adapters"


@pytest.fixture
def process(serving, engine, folder, tmp_path):
    """``with process() as (server, client)``: one process after another, with the same folders."""

    @contextmanager
    def run(key: str = "none", **settings):
        with serving(data_dir=str(tmp_path / "data"), adapter_dir=str(folder), **settings) as server:
            with openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0) as client:
                yield server, client
        for name in list(engine.adapters.named):
            engine.unload_adapter(name)

    return run


def post(server: Running, action: str, name: str, path: str | None = None, key: str = "none") -> httpx.Response:
    body = {"lora_name": name} | ({} if path is None else {"lora_path": path})
    headers = {"Authorization": f"Bearer {key}"}
    return httpx.post(f"{server.url}/v1/{action}_lora_adapter", json=body, headers=headers, timeout=30)


def load(server: Running, name: str, path: str) -> None:
    assert post(server, "load", name, path).status_code == 200


def said(client, model: str) -> str:
    return client.completions.create(model=model, **GREEDY).choices[0].text


def listed(client) -> dict[str, str]:
    """Adapters, with where they come from."""
    return {model.id: model.root for model in client.models.list() if model.parent is not None}


def test_the_next_process_has_them_and_brings_one_when_it_is_asked_for(process, engine, voices):
    with process() as (server, client):
        load(server, "first", "poet")
        load(server, "second", "./poet")
        load(server, "first", "painter")
        load(server, "gone", "poet")
        assert post(server, "unload", "gone").status_code == 200
        cards = list(client.models.list())[1:]
    for _ in range(2):
        with process() as (server, client):
            assert engine.adapters.named == {} and listed(client) == {"first": "painter", "second": "./poet"}
            assert [card.model_copy(update={"created": 0}) for card in list(client.models.list())[1:]] == [
                card.model_copy(update={"created": 0}) for card in cards
            ]
            assert said(client, "second") == voices["poet"] and set(engine.adapters.named) == {"second"}
            assert said(client, "first") == voices["painter"]
            assert client.models.retrieve("second").root == "./poet"
            with pytest.raises(openai.NotFoundError):
                said(client, "gone")
    with process() as (server, client):
        assert post(server, "unload", "second").status_code == 200, "nobody has asked for it in this process"
        assert post(server, "unload", "second").status_code == 404
        load(server, "first", "poet")
        assert said(client, "first") == voices["poet"] and listed(client) == {"first": "poet"}
    with process() as (_, client):
        assert said(client, "first") == voices["poet"] and listed(client) == {"first": "poet"}


def other_weights(folder: Path) -> None:
    shutil.copy(folder / "painter" / "adapter_model.safetensors", folder / "poet" / "adapter_model.safetensors")


def other_scale(folder: Path) -> None:
    file = folder / "poet" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"lora_alpha": 16}))


def torn(folder: Path) -> None:
    file = folder / "poet" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


@pytest.mark.parametrize("change", [other_weights, other_scale, torn])
def test_files_that_are_not_those_that_were_loaded_are_refused(process, folder, voices, change):
    """Until they are there again, or the name is given to what is there now."""
    shutil.copytree(folder / "poet", folder.with_name("kept"))
    with process() as (server, _):
        load(server, "poet", "poet")
        load(server, "painter", "painter")
    change(folder)
    with process() as (server, client):
        for _ in range(2):
            with pytest.raises(openai.BadRequestError, match="'poet' cannot be loaded") as caught:
                said(client, "poet")
            assert caught.value.code == "model_cannot_be_loaded" and str(folder) not in str(caught.value)
            assert change is torn or "its files have changed; load it again" in str(caught.value)
        with pytest.raises(openai.APIError, match="cannot be loaded"):
            list(client.completions.create(model="poet", stream=True, **GREEDY))
        assert listed(client) == {"painter": "painter"} and said(client, "painter") == voices["painter"]
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve("poet")
    shutil.rmtree(folder / "poet")
    with process() as (server, client):
        assert listed(client) == {"painter": "painter"}
        with pytest.raises(openai.BadRequestError, match="There is no folder 'poet' in the server's adapter_dir"):
            said(client, "poet")
        shutil.copytree(folder.with_name("kept"), folder / "poet")
        assert said(client, "poet") == voices["poet"] and set(listed(client)) == {"painter", "poet"}
    change(folder)
    if change is not torn:
        with process() as (server, client):
            load(server, "poet", "poet")
            assert set(listed(client)) == {"painter", "poet"} and said(client, "poet") != voices["poet"]


def test_a_load_that_cannot_be_written_down_leaves_nothing(process, engine, voices):
    with process() as (server, client):
        load(server, "held", "poet")
        loaded = ["held"]
        with database_full(server.service):
            for number in range(1000):
                if (answer := post(server, "load", f"x{number}", "painter")).status_code != 200:
                    break
                loaded.append(f"x{number}")
            assert (answer.status_code, answer.json()["error"]["code"]) == (507, "storage_full")
            assert set(listed(client)) == set(engine.adapters.named) == set(loaded)
            with pytest.raises(openai.NotFoundError):
                said(client, f"x{number}")
    with process() as (_, client):
        assert set(listed(client)) == set(loaded) and said(client, "held") == voices["poet"]


def fail(error: Exception):
    def fails(*_, **__):
        raise error

    return fails


def test_a_name_keeps_its_meaning_where_its_replacement_fails(process, engine, voices, monkeypatch):
    full = sqlite3.OperationalError("database or disk is full")
    full.sqlite_errorcode = sqlite3.SQLITE_FULL
    with process() as (server, client):
        load(server, "held", "poet")
        places = (server.service.store, "add", full, 507), (engine.library, "add", EngineStopped("it stopped"), 503)
        for owner, method, error, status in places:
            with monkeypatch.context() as patch:
                patch.setattr(owner, method, fail(error))
                assert post(server, "load", "held", "painter").status_code == status
                assert post(server, "load", "new", "painter").status_code == status
            assert said(client, "held") == voices["poet"] and listed(client) == {"held": "poet"}
            assert [row["path"] for row in server.service.store.rows("adapters", {})] == ["poet"]
        with monkeypatch.context() as patch:
            patch.setattr(server.service.store, "remove", fail(full))
            assert post(server, "unload", "held").status_code == 507
        assert said(client, "held") == voices["poet"]
    with process() as (_, client):
        assert said(client, "held") == voices["poet"] and listed(client) == {"held": "poet"}


def test_each_owner_has_its_own_again(process, folder, tmp_path, voices):
    """What was loaded without keys is the operator's; without keys again, what others loaded is not shown."""
    for owner, name in (("ann", "poet"), ("bob", "painter")):
        shutil.copytree(folder / name, folder / owner / name)
    (tmp_path / "keys").write_text("ann sk-ann\nbob sk-bob\n")
    keys = {"api_keys": ("sk-op",), "api_keys_file": str(tmp_path / "keys")}
    with process() as (server, _):
        load(server, "own", "painter")
    with process(**keys) as (server, _):
        assert post(server, "load", "own", "poet", "sk-ann").status_code == 200
        assert post(server, "load", "own", "painter", "sk-bob").status_code == 200
        assert post(server, "load", "anns", "poet", "sk-ann").status_code == 200
    expected = {"sk-ann": ("poet", {"own": "poet", "anns": "poet"}), "sk-bob": ("painter", {"own": "painter"})}
    expected |= {"sk-op": ("painter", {"own": "painter"})}
    for key, (voice, names) in expected.items():
        with process(key, **keys) as (server, client):
            assert listed(client) == names and said(client, "own") == voices[voice]
            assert post(server, "unload", "anns", key=key).status_code == (200 if "anns" in names else 404)
    with process() as (_, client):
        assert listed(client) == {"own": "painter"} and said(client, "own") == voices["painter"]


@contextmanager
def beside(tuning, folder: Path, data: Path):
    """Another server of an engine that trains."""
    server = Running(tuning.engine, ServerConfig(port=0, data_dir=str(data), adapter_dir=str(folder)))
    server.start()
    try:
        with server.client() as client:
            yield server, client
    finally:
        server.stop()


def test_a_job_of_the_configuration_keeps_its_name(tuning, folder, tmp_path, voices):
    engine = tuning.engine
    with beside(tuning, folder, tmp_path / "data") as (server, client):
        load(server, "keeper", "poet")
        assert said(client, "keeper") == voices["poet"]
    job = engine.finetune(FinetuneJob(name="keeper", data=ROWS, **FAST, max_steps=1))
    assert job.wait(60) == "succeeded"
    with beside(tuning, folder, tmp_path / "data") as (server, client):
        refused = post(server, "load", "keeper", "poet")
        assert refused.status_code == 400 and "a job of the configuration trains" in refused.text
        assert listed(client)["keeper"] == "keeper" and said(client, "keeper") != voices["poet"]
    engine.unload_adapter("keeper")
