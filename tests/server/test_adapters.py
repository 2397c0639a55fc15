"""Adapters loaded and unloaded by clients, and the list of models that shows them."""

import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest

from flexjax.engine.adapters import NoRoomForAdapter
from flexjax.request import SamplingParams
from tests.server.conftest import halted_by_the_first_output, wait_until
from tests.server.test_monitoring import samples

GREEDY = {"max_tokens": 30, "temperature": 0, "extra_body": {"ignore_eos": True}}
NO_END = {"temperature": 0, "extra_body": {"ignore_eos": True}}
PROMPT = "hello there"


def post(server, action: str, **body) -> httpx.Response:
    return httpx.post(f"{server.url}/v1/{action}_lora_adapter", json=body, timeout=30)


@pytest.fixture
def poet(server):
    answer = post(server, "load", lora_name="poet", lora_path="poet")
    assert (answer.status_code, answer.text) == (200, "Success: LoRA adapter 'poet' added successfully.")
    yield "poet"
    post(server, "unload", lora_name="poet")


def text(engine, adapter: str | None) -> str:
    return engine.generate([PROMPT], SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True), adapter)[0].text


def test_models_are_the_base_and_its_adapters(server, client, engine, poet):
    base, adapter = client.models.list()
    assert (base.id, base.object, base.root, base.parent) == ("tiny", "model", engine.config.model, None)
    assert (adapter.id, adapter.root, adapter.parent) == ("poet", "poet", "tiny")
    assert base.max_model_len == adapter.max_model_len == 256 and base.created > 1_700_000_000
    assert client.models.retrieve("poet") == adapter and client.models.retrieve("tiny") == base
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("org/ghost")
    assert caught.value.code == "model_not_found" and "'org/ghost'" in str(caught.value)


def test_an_adapter_answers_until_it_is_unloaded(server, client, engine, poet):
    answer = client.completions.create(model=poet, prompt=PROMPT, **GREEDY)
    assert answer.model == "poet" and answer.choices[0].text == text(engine, "poet") != text(engine, None)
    gone = post(server, "unload", lora_name="poet")
    assert (gone.status_code, gone.text) == (200, "Success: LoRA adapter 'poet' removed successfully.")
    with pytest.raises(openai.NotFoundError, match="The model 'poet' does not exist"):
        client.completions.create(model=poet, prompt=PROMPT, **GREEDY)
    assert post(server, "unload", lora_name="poet").status_code == 404
    assert [model.id for model in client.models.list()] == ["tiny"]


def watched(monkeypatch, owner, name: str) -> threading.Event:
    """Is set once the method has been called, and has returned."""
    method, called = getattr(owner, name), threading.Event()

    def watch(*arguments):
        result = method(*arguments)
        called.set()
        return result

    monkeypatch.setattr(owner, name, watch)
    return called


def test_a_request_keeps_the_version_it_began_with(server, client, engine, poet, monkeypatch):
    """The name is given to another adapter in the middle of an answer: the engine stands still until that is asked."""
    old, version = text(engine, "poet"), engine.loop.call(engine.adapters.find, "poet")
    with ThreadPoolExecutor() as threads:
        with halted_by_the_first_output(server):
            stream = client.completions.create(model=poet, prompt=PROMPT, stream=True, **GREEDY)
            shown = next(iter(stream)).choices[0].text
            asked = watched(monkeypatch, engine.loop, "post")
            replaced = threads.submit(post, server, "load", lora_name="poet", lora_path="painter")
            assert asked.wait(20)
        assert replaced.result().status_code == 200
    shown += "".join(chunk.choices[0].text for chunk in stream)
    assert engine.loop.call(engine.adapters.find, "poet").version > version.version
    assert shown == old != text(engine, "poet")
    assert next(model for model in client.models.list() if model.id == "poet").root == "painter"


@pytest.mark.parametrize(
    ("path", "status", "words"),
    [
        ("../elsewhere", 400, "outside the server's adapter_dir"),
        ("/etc", 400, "outside the server's adapter_dir"),
        ("link", 400, "outside the server's adapter_dir"),
        ("poet/../../elsewhere", 400, "outside the server's adapter_dir"),
        ("zero\0byte", 400, "is no path"),
        ("x" * 5000, 404, "no folder"),
        ("circle", 400, ""),
        ("ghost", 404, "no folder 'ghost'"),
        ("empty", 400, "cannot be loaded"),
        (".", 400, "cannot be loaded"),
    ],
)
def test_only_folders_of_the_adapter_folder_can_be_named(server, adapter_dir, path, status, words):
    make_traps(adapter_dir)
    answer = post(server, "load", lora_name="x", lora_path=path)
    error = answer.json()["error"]
    assert answer.status_code == status and error["param"] == "lora_path" and words in error["message"]
    assert str(adapter_dir) not in error["message"], "where the server keeps things is its own"


def make_traps(folder) -> None:
    """A link to a whole adapter outside, a link to itself, and a folder without an adapter."""
    outside = folder.parent / "elsewhere"
    if not outside.exists():
        outside.mkdir()
        for file in (folder / "poet").iterdir():
            (outside / file.name).write_bytes(file.read_bytes())
        (folder / "link").symlink_to(outside)
        (folder / "circle").symlink_to(folder / "circle")
        (folder / "empty").mkdir()


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"lora_path": "poet"}, "lora_name"),
        ({"lora_name": "", "lora_path": "poet"}, "lora_name"),
        ({"lora_name": "x"}, "lora_path"),
        ({"lora_name": "tiny", "lora_path": "poet"}, "lora_name"),
        ({"lora_name": "a\nb", "lora_path": "poet"}, "lora_name"),
        ({"lora_name": "ft:tiny:flexjax::x", "lora_path": "poet"}, "lora_name"),
        ({"lora_name": 3, "lora_path": "poet"}, "lora_name"),
        ({"lora_name": "x", "lora_path": "poet", "lora_pth": ""}, "lora_pth"),
    ],
)
def test_what_is_wrong_is_named(server, body, param):
    answer = post(server, "load", **body)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == param


def test_there_may_be_more_adapters_than_places(server, client, engine):
    """There are 12 places; of 15 names, poet and painter by turns, each answers as itself."""
    named = {f"copy{number}": ("poet", "painter")[number % 2] for number in range(15)}
    before = samples(server)
    for name, folder in named.items():
        assert post(server, "load", lora_name=name, lora_path=folder).status_code == 200
    said = {name: client.completions.create(model=name, prompt=PROMPT, **GREEDY).choices[0].text for name in named}
    assert len({said[name] for name, folder in named.items() if folder == "poet"}) == 1
    assert len(set(said.values())) == 2 and said["copy0"] == text(engine, "copy0") != text(engine, None)
    now = samples(server)
    assert now["flexjax:adapters_resident",] == now["flexjax:adapter_places",] == 12
    for name in ("flexjax:adapter_loads_total", "flexjax:adapter_evictions_total"):
        assert now[name,] > before[name,]
    for name in named:
        post(server, "unload", lora_name=name)
    wait_until(lambda: len(list(client.models.list())) == 1)


def test_what_jobs_leave_no_room_for_may_be_asked_for_later(client, engine, poet, monkeypatch):
    def full(version):
        raise NoRoomForAdapter(f"adapter {version.name!r} finds no place beside the running jobs; raise max_adapters")

    monkeypatch.setattr(engine.library.tier, "require_possible", full)
    with pytest.raises(openai.InternalServerError, match="'poet' finds no place") as caught:
        client.completions.create(model=poet, prompt=PROMPT, **GREEDY)
    assert (caught.value.status_code, caught.value.code) == (503, "no_room")
    assert caught.value.response.headers["retry-after"] == "60"


@pytest.mark.parametrize("stream", [False, True])
def test_an_adapter_whose_files_are_gone_is_our_mistake(server, client, engine, adapter_dir, tmp_path, caplog, stream):
    shutil.copytree(adapter_dir / "poet", tmp_path / "gone")
    engine.register_adapter("gone", tmp_path / "gone")
    shutil.rmtree(tmp_path / "gone")
    try:
        with pytest.raises(openai.APIError) as caught:
            list(client.completions.create(model="gone", prompt=PROMPT, stream=stream, **GREEDY))
    finally:
        engine.unload_adapter("gone")
    assert caught.value.code == "internal_error" and str(tmp_path) not in str(caught.value)
    assert "adapter 'gone' cannot be brought to the device" in caplog.text and str(tmp_path) in caplog.text
    wait_until(lambda: server.service.admission.open == 0)


def test_metrics_name_the_adapters_of_requests(server, client, poet):
    """Four rows: of eight sequences four wait. The value is the time of the look."""
    begun = time.time()
    named = lambda: {key[1:]: value for key, value in samples(server).items() if key[0] == "vllm:lora_requests_info"}
    with client.completions.create(model=poet, prompt=[7], max_tokens=250, n=8, stream=True, **NO_END) as stream:
        next(iter(stream))
        wait_until(lambda: named().keys() == {("12", "poet", "poet")})
    wait_until(lambda: named().keys() == {("12", "", "")})
    (looked,) = named().values()
    assert begun < looked <= time.time()
