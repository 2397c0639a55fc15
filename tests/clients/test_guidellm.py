"""guidellm's load: every request succeeds with the float64 model's answer, and both sides count the same tokens."""

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.clients.foreign import drive, needs
from tests.clients.oracle import Answerer, text_ids

pytestmark = needs("guidellm")
REQUESTS, STREAMS, PROMPT, TOKENS = 24, 6, 48, 12
"""More streams than rows, so that some wait."""

LOAD = {"requests": REQUESTS, "streams": STREAMS, "prompt": PROMPT, "tokens": TOKENS}
COUNTERS = ("vllm:prompt_tokens_total", "vllm:generation_tokens_total")


def counters(service) -> list[float]:
    """The service's own."""
    text = httpx.get(f"{service.url.removesuffix('/v1')}/metrics").text
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return [sum(sample.value for sample in samples if sample.name == name) for name in COUNTERS]


@pytest.fixture(scope="module")
def seen(service, tmp_path_factory, noted) -> dict:
    task, before = service.task | LOAD | {"folder": str(tmp_path_factory.mktemp("load"))}, counters(service)
    found = drive("guidellm", "with_guidellm.py", task)
    found["counted"] = [now - then for now, then in zip(counters(service), before, strict=True)]
    noted["guidellm"] = {
        "version": found["version"],
        "requests": found["totals"]["successful"],
        "tokens": sum(found["sums"]),
    }
    return found


def test_all_requests_succeed(seen):
    assert seen["totals"] == {"successful": REQUESTS, "errored": 0, "incomplete": 0, "total": REQUESTS}


def test_both_sides_count_the_same_tokens(seen):
    assert [answer["tokens"] for answer in seen["answers"]] == [[PROMPT, TOKENS]] * REQUESTS
    assert seen["sums"] == seen["counted"] == [REQUESTS * PROMPT, REQUESTS * TOKENS]
    assert [len(text_ids(answer["prompt"])) for answer in seen["answers"]] == [PROMPT] * REQUESTS


def test_answers_are_the_models(seen):
    for answer in seen["answers"]:
        assert answer["text"] == Answerer().text(text_ids(answer["prompt"]), TOKENS)
    assert len({answer["prompt"] for answer in seen["answers"]}) == REQUESTS


def test_answers_arrive_as_they_are_made(seen):
    assert all(0 < first < whole for first, whole in (answer["times"] for answer in seen["answers"]))
