"""A tiny model behind the HTTP service, in this process: an engine for all tests, and servers on free ports."""

import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import openai
import pytest

from flexjax.config import EngineConfig
from flexjax.engine.engine import Engine
from flexjax.server.app import create_app
from flexjax.server.config import ServerConfig
from flexjax.server.process import ServerProcess, address_of, bind
from flexjax.server.service import Service
from flexjax.weights.adapter import fresh_adapter
from flexjax.weights.peft import write_adapter
from tests.ladder import Model
from tests.server.jobs import PINNED, ROWS, SHORT, create, ended, jsonl, upload
from tests.tiny_model import CONFIG, ENGINE, write_tiny_model

ADAPTERS = {"poet": 1, "painter": 2}
"""Names of adapters on disk, with the seeds of their weights."""

MODULES = ("q_proj", "down_proj")

HEADERS = {name: {"Authorization": f"Bearer sk-{name}"} for name in ("ann", "bob", "operator")}
"""Of the owners that `owned` has."""


def factors(seed: int) -> dict[str, dict]:
    """Weights of an adapter that changes every answer, as the dense model takes them."""
    return Model.random(CONFIG).factors(4, seed, MODULES)


@pytest.fixture(scope="session")
def adapter_dir(tmp_path_factory) -> Path:
    """Holds a PEFT adapter for each of ADAPTERS."""
    folder = tmp_path_factory.mktemp("adapters")
    fresh = fresh_adapter(CONFIG, rank=4, alpha=8, target_modules=MODULES)
    for name, seed in ADAPTERS.items():
        pairs = factors(seed)
        write_adapter(folder / name, fresh.with_weights({m: (pairs["a"][m], pairs["b"][m]) for m in MODULES}))
    return folder


@pytest.fixture(scope="session")
def engine(tmp_path_factory, compilation_cache) -> Iterator[Engine]:
    """Of the shapes that the engine's own tests have, so that its programs are compiled once for all."""
    model = write_tiny_model(tmp_path_factory.mktemp("model") / "tiny")
    settings = EngineConfig(**ENGINE, model=str(model), compilation_cache=compilation_cache)
    with Engine.from_config(settings) as engine:
        yield engine
        engine.loop.call(engine.scheduler.check)
        statistics = engine.scheduler.statistics
        assert statistics.running == statistics.waiting == 0, "a request outlived its client"
        assert statistics.available_pages == statistics.pages, "pages are still held"


@dataclass
class Running:
    """A server of this process.

    Attributes:
        host, port, url: where it listens.
    """

    engine: Engine
    config: ServerConfig
    process: ServerProcess = field(init=False)

    def __post_init__(self):
        self.listener = bind(self.config)
        self.host, self.port = self.listener.getsockname()[:2]
        self.url = address_of(self.listener)
        app = create_app(self.engine, self.config)
        self.service: Service = app.state.service
        self.process = ServerProcess(app, self.config)
        self._thread = threading.Thread(target=self.process.run, kwargs={"sockets": [self.listener]})

    def start(self) -> None:
        self._thread.start()
        wait_until(lambda: self.process.started)

    def stop(self) -> None:
        self.process.handle_exit(signal.SIGTERM, None)
        self._thread.join(30)
        assert not self._thread.is_alive(), "the server did not stop"
        self.service.close()

    @property
    def stopped(self) -> bool:
        return not self._thread.is_alive()

    def client(self, **settings) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, **settings)

    def async_client(self, **settings) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, **settings)


@pytest.fixture(scope="session")
def serving(engine, adapter_dir, tmp_path_factory) -> Callable:
    """``with serving(max_queue=3) as server``: a server with such settings."""

    @contextmanager
    def serve(**settings) -> Iterator[Running]:
        data = str(tmp_path_factory.mktemp("data"))
        usual = {"port": 0, "adapter_dir": str(adapter_dir), "data_dir": data}
        server = Running(engine, ServerConfig(**{**usual, **settings}))
        server.start()
        try:
            yield server
        finally:
            server.stop()

    return serve


@pytest.fixture(scope="session")
def server(serving) -> Iterator[Running]:
    with serving() as server:
        yield server


@pytest.fixture(scope="session")
def client(server) -> Iterator[openai.OpenAI]:
    with server.client() as client:
        yield client


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> str:
    return str(write_tiny_model(tmp_path_factory.mktemp("tuned") / "tiny"))


@pytest.fixture(scope="session")
def tuning(model, tmp_path_factory, compilation_cache) -> Iterator[Running]:
    """A server whose engine keeps checkpoints."""
    folder = tmp_path_factory.mktemp("tuning")
    settings = {**ENGINE, **PINNED, "model": model, "compilation_cache": compilation_cache}
    with Engine.from_config(EngineConfig(**settings, checkpoint_dir=str(folder / "checkpoints"))) as engine:
        server = Running(engine, ServerConfig(port=0, data_dir=str(folder)))
        server.start()
        yield server
        server.stop()


@pytest.fixture(scope="session")
def tuner(tuning) -> Iterator[openai.OpenAI]:
    with tuning.client() as client:
        yield client


@pytest.fixture(scope="session")
def rows(tuner) -> str:
    return upload(tuner, jsonl(ROWS)).id


@pytest.fixture(scope="session")
def finished(tuner, rows):
    """A job that has succeeded, with its validation file."""
    held_out = upload(tuner, jsonl(ROWS[:2]), "held_out.jsonl").id
    job = create(tuner, rows, SHORT, suffix="sums", seed=7, validation_file=held_out, metadata={"team": "a"})
    assert job.status == "validating_files" and job.fine_tuned_model is None and job.finished_at is None
    done = ended(tuner, job.id)
    assert done.status == "succeeded", done.error
    return done


@pytest.fixture(scope="session")
def owned(model, adapter_dir, tmp_path_factory, compilation_cache) -> Iterator[Running]:
    """A server whose owners are ann, bob and the operator, that keeps the newest three checkpoints of a job. "house" is
    an adapter of its configuration."""
    folder = tmp_path_factory.mktemp("owned")
    (folder / "keys").write_text("ann sk-ann\nbob sk-bob\n")
    settings = {**ENGINE, **PINNED, "model": model, "compilation_cache": compilation_cache}
    keys = {"api_keys": ("sk-operator",), "api_keys_file": str(folder / "keys")}
    with Engine.from_config(EngineConfig(**settings, checkpoint_dir=str(folder / "checkpoints"))) as engine:
        engine.load_adapter("house", adapter_dir / "poet")
        server = Running(engine, ServerConfig(port=0, data_dir=str(folder), max_checkpoints=3, **keys))
        for name in ("poet", "painter", "ann/poet", "bob/painter"):
            shutil.copytree(adapter_dir / name.rpartition("/")[2], server.config.adapters / name)
        server.start()
        yield server
        server.stop()


@pytest.fixture(scope="session")
def people(owned) -> Iterator[dict[str, openai.OpenAI]]:
    """Clients of its owners."""
    with ExitStack() as stack:
        settings = {"base_url": f"{owned.url}/v1", "max_retries": 0}
        yield {name: stack.enter_context(openai.OpenAI(api_key=f"sk-{name}", **settings)) for name in HEADERS}


@contextmanager
def halted(engine: Engine) -> Iterator[None]:
    """No iteration runs inside; commands wait."""
    go_on = threading.Event()
    engine.loop.post(go_on.wait)
    try:
        yield
    finally:
        go_on.set()


@contextmanager
def halted_by_the_first_output(server: Running) -> Iterator[threading.Event]:
    """The engine stands still as soon as it has told the server something, which sets the event; to the end of this."""
    bridge, told, go_on = server.service.bridge, threading.Event(), threading.Event()
    put = bridge.put

    def put_and_halt(*arguments) -> None:
        bridge.put = put
        server.engine.loop.post(go_on.wait)
        put(*arguments)
        told.set()

    bridge.put = put_and_halt
    try:
        yield told
    finally:
        go_on.set()


def wait_until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "what was waited for did not happen"
        time.sleep(0.005)
