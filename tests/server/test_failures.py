"""What clients are told when the engine fails, or the service itself does."""

import json
from concurrent.futures import Future
from types import SimpleNamespace

import openai
import pytest

from flexjax.engine.loop import EngineStopped
from flexjax.request import RequestOutput
from flexjax.server.config import ServerConfig
from tests.server.conftest import Running

BODY = {"model": "tiny", "prompt": "ab", "max_tokens": 5}


class Failing:
    """An engine that generates one token and then reports that its thread died; prompts of "x" are too much for it."""

    def __init__(self, engine):
        self.config, self.defaults, self.tokenizer, self.adapters = (
            engine.config,
            engine.defaults,
            engine.tokenizer,
            engine.adapters,
        )
        self.loop = SimpleNamespace(post=self._refuse, failure=None)  # not noticed yet

    def encode(self, prompt):
        if prompt == "x":
            raise KeyError("a mistake of ours")
        return list(prompt.encode())

    def submit_soon(self, submissions):
        taken: Future = Future()
        taken.set_result([[1]])
        for each in submissions:
            each.listener.put(RequestOutput(0, each.prompt, [65], "A"))
            each.listener.put(RequestOutput(0, each.prompt, [65], "A", "error", error="secret path /model"))
        return taken

    def _refuse(self, *_):
        refused: Future = Future()
        refused.set_exception(EngineStopped("the engine has stopped"))
        return refused


@pytest.fixture(scope="module")
def failing(engine, tmp_path_factory):
    settings = ServerConfig(port=0, data_dir=str(tmp_path_factory.mktemp("data")))
    server = Running(Failing(engine), settings)
    server.start()
    yield server
    server.stop()


@pytest.fixture(scope="module")
def broken(failing):
    with failing.client() as client:
        yield client


def test_a_sequence_that_fails_is_status_500(broken, failing):
    with pytest.raises(openai.InternalServerError) as caught:
        broken.completions.create(**BODY)
    assert caught.value.status_code == 500 and caught.value.code == "internal_error"
    assert "secret" not in str(caught.value) and failing.service.admission.open == 0
    assert failing.service.totals.ended["error"] >= 1


def test_a_stream_that_fails_says_so_in_its_last_event(broken):
    with pytest.raises(openai.APIError) as caught:
        for chunk in broken.completions.create(stream=True, **BODY):
            assert chunk.choices[0].finish_reason is None
    assert caught.value.code == "internal_error"


def test_a_mistake_of_ours_is_status_500_with_an_id_and_a_traceback(broken, caplog):
    with pytest.raises(openai.InternalServerError) as caught:
        broken.completions.create(**BODY | {"prompt": "x"}, extra_headers={"X-Request-Id": "odd"})
    assert caught.value.body["type"] == "server_error" and caught.value.response.headers["x-request-id"] == "odd"
    (record,) = [each for each in caplog.records if each.exc_info]
    assert "odd" in record.getMessage() and "a mistake of ours" in str(record.exc_info[1])


@pytest.mark.parametrize("path", ["/health", "/metrics"])
def test_an_engine_that_has_stopped_is_not_healthy(broken, path):
    with pytest.raises(openai.InternalServerError) as caught:
        broken.get(f"{str(broken.base_url).removesuffix('/v1/')}{path}", cast_to=object)
    assert caught.value.status_code == 503
    assert json.loads(caught.value.response.text)["error"]["code"] == "engine_stopped"
