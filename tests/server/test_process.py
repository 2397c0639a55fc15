"""Stopping: what runs ends, what is new is refused; and when the time is up, clients are told."""

import signal
import threading

import httpx
import openai
import pytest

from flexjax.fields import ConfigError
from flexjax.request import RequestOutput
from flexjax.server.config import ServerConfig
from flexjax.server.process import address_of, bind
from tests.server.conftest import Running, halted, wait_until

BODY = {"model": "tiny", "prompt": "a", "max_tokens": 100, "temperature": 0, "extra_body": {"ignore_eos": True}}


def test_running_requests_end_while_new_ones_are_refused(serving, engine):
    with serving() as server, server.client() as client:
        with halted(engine):
            answers = []
            asking = threading.Thread(target=lambda: answers.append(client.completions.create(**BODY)))
            asking.start()
            wait_until(lambda: server.service.admission.open == 1)
            server.process.handle_exit(signal.SIGTERM, None)
            with pytest.raises(openai.InternalServerError) as caught:
                client.completions.create(**BODY)
            refusals = [
                httpx.get(f"{server.url}/health"),
                httpx.post(f"{server.url}/v1/load_lora_adapter", json={"lora_name": "x", "lora_path": "poet"}),
            ]
            assert not server.stopped
        asking.join(30)
        wait_until(lambda: server.stopped)
    assert caught.value.status_code == 503 and caught.value.code == "stopping"
    assert [answer.status_code for answer in refusals] == [503, 503]
    assert all(int(answer.headers["retry-after"]) > 0 for answer in (caught.value.response, *refusals))
    assert answers[0].usage.completion_tokens == 100


def test_an_idle_server_stops_at_once(serving):
    with serving() as server:
        server.process.handle_exit(signal.SIGINT, None)
        wait_until(lambda: server.stopped, seconds=5)
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{server.url}/health")


class Endless:
    """An engine that takes requests and answers them only when it is closed, with "abort"."""

    def __init__(self, engine):
        self.config, self.defaults, self.model, self.tokenizer = (
            engine.config,
            engine.defaults,
            engine.model,
            engine.tokenizer,
        )
        self.encode, self.loop, self.adapters = engine.encode, engine.loop, engine.adapters
        self._engine, self._listeners, self.closed = engine, [], False

    def submit_soon(self, submissions):
        self._listeners += [each.listener for each in submissions]
        return self._engine.loop.post(lambda: [[] for _ in submissions])

    def close(self):
        self.closed = True
        for listener in self._listeners:
            listener.put(RequestOutput(0, [], finish_reason="abort"))


@pytest.mark.parametrize("stream", [True, False])
def test_when_the_time_is_up_clients_are_told(engine, stream, tmp_path):
    endless = Endless(engine)
    server = Running(endless, ServerConfig(port=0, drain_seconds=0.2, data_dir=str(tmp_path)))
    server.start()
    errors = []

    def ask(client):
        try:
            answer = client.completions.create(stream=stream, **BODY)
            list(answer)
        except openai.APIError as error:
            errors.append(error)

    with server.client() as client:
        asking = threading.Thread(target=ask, args=(client,))
        asking.start()
        wait_until(lambda: server.service.admission.open == 1)
        server.stop()
        asking.join(10)
    assert endless.closed and errors[0].code == "stopping"
    assert "stopped before the answer was whole" in errors[0].message


def test_a_port_in_use_is_refused(server):
    with pytest.raises(ConfigError, match=f"host 127.0.0.1 port {server.port}: Address already in use"):
        with bind(ServerConfig(port=server.port)) as second:
            second.listen()


def test_addresses_can_be_typed_into_a_browser():
    with bind(ServerConfig(host="::1", port=0)) as listener:
        assert address_of(listener) == f"http://[::1]:{listener.getsockname()[1]}"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"port": 70000}, "port is 70000; it must be at least 0 and at most 65535"),
        ({"max_queue": -1}, "max_queue is -1"),
        ({"max_body_bytes": 0}, "max_body_bytes is 0"),
        ({"drain_seconds": -1.0}, "drain_seconds is -1.0"),
        ({"host": 1}, "host is 1; it must be text"),
        ({"allowed_origins": ("chat.example.org",)}, "allowed_origins holds 'chat.example.org'; an origin is scheme://"),
        ({"allowed_origins": ("https://a.org/",)}, "allowed_origins holds 'https://a.org/'"),
    ],
)
def test_settings_outside_their_range_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        ServerConfig(**settings)
