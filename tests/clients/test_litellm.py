"""litellm: the float64 model's answers, and every refusal as the exception that litellm has for it."""

import pytest

from tests.clients.conftest import service_of
from tests.clients.foreign import drive, needs
from tests.clients.oracle import Answerer, chat_ids
from tests.server.jobs import PROMPT

pytestmark = needs("litellm")
TOKENS = 6
REQUESTS = 20
"""A minute of each owner: more than the script needs before it asks until it is refused."""


@pytest.fixture(scope="module")
def seen(tmp_path_factory, compilation_cache, noted) -> dict:
    folder = tmp_path_factory.mktemp("limited")
    with service_of(folder, compilation_cache, requests_per_minute=REQUESTS) as service:
        found = drive("litellm", "with_litellm.py", service.task | {"prompt": PROMPT, "tokens": TOKENS})
    refusals = sum(bool(found[name]) for name in ("wrong_key", "wrong_model", "too_long", "wrong_field", "too_many"))
    noted["litellm"] = {"version": found["version"], "refusals": refusals}
    return found


def test_answers(seen):
    ids = chat_ids(PROMPT)
    assert seen["text"] == seen["streamed_text"] == Answerer().text(ids, TOKENS)
    assert seen["finish_reason"] == "length" and seen["streamed_finish_reason"] == ["length"]
    assert seen["usage"] == seen["streamed_usage"] == [len(ids), TOKENS]


@pytest.mark.parametrize(
    ("name", "exception", "status", "words"),
    [
        ("wrong_key", "AuthenticationError", 401, "key"),
        ("wrong_model", "NotFoundError", 404, "ghost"),
        ("too_long", "ContextWindowExceededError", 400, "256"),
        ("wrong_field", "BadRequestError", 400, "temperature is -1"),
        ("too_many", "RateLimitError", 429, f"requests_per_minute is {REQUESTS}"),
    ],
)
def test_refusals(seen, name, exception, status, words):
    found = seen[name]
    assert found[:2] == [exception, status] and words in found[2]


def test_the_time_to_wait_arrives(seen):
    assert 1 <= int(seen["too_many"][3]) <= 60
