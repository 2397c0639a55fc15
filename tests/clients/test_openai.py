"""OpenAI's client, two generations: every answer is the float64 model's, and a job's model is what was exported."""

import pytest

from tests.clients.foreign import drive, needs
from tests.clients.oracle import TOKENIZER, TOLERANCE, Answerer, chat_ids, text_ids
from tests.server.jobs import FAST, PROMPT, ROWS, jsonl

TOKENS = 6
OTHER = "hello there"
JOB = {**FAST, "batch_size": 4, "checkpoint_every": 2}
ASKED = {"prompt": PROMPT, "other": OTHER, "tokens": TOKENS, "rows": jsonl(ROWS).decode(), "hyperparameters": JOB}


@pytest.fixture(scope="module", params=[pytest.param(name, marks=needs(name)) for name in ("openai2", "openai3")])
def seen(request, service, noted) -> dict:
    """What a generation of the client saw."""
    found = drive(request.param, "with_openai.py", service.task | ASKED)
    assert found["version"].split(".")[0] == request.param[-1]
    steps, checkpoints = (len(found["tuned"][name]) for name in ("steps", "checkpoints"))
    noted[request.param] = {"version": found["version"], "steps": steps, "checkpoints": checkpoints}
    return found


def test_chats(seen):
    chat, ids = seen["chat"], chat_ids(PROMPT)
    answer = Answerer().continuation(ids, TOKENS)
    logprobs = Answerer().own_logprobs(ids + answer)[-TOKENS:]
    assert chat["text"] == chat["streamed_text"] == TOKENIZER.decode(answer)
    for name in ("logprobs", "streamed_logprobs"):
        assert chat[name] == pytest.approx(logprobs, abs=TOLERANCE)
    assert chat["top"] == chat["logprobs"], "greedy answers are the likeliest tokens"
    assert chat["finish_reason"] == chat["streamed_finish_reason"] == "length"
    assert chat["usage"] == chat["streamed_usage"] == [len(ids), TOKENS] and chat["chunks"] > 2


def test_completions(seen):
    found, prompts = seen["completions"], [text_ids(PROMPT), text_ids(OTHER)]
    assert found["texts"] == [Answerer().text(ids, TOKENS) for ids in prompts]
    assert found["echo"] == PROMPT + found["texts"][0]
    assert found["usage"] == [sum(map(len, prompts)), 2 * TOKENS]
    first, *others = found["logprobs"]
    whole = prompts[0] + Answerer().continuation(prompts[0], TOKENS)
    assert first is None and others == pytest.approx(Answerer().own_logprobs(whole), abs=TOLERANCE)


def test_files(seen):
    files = seen["files"]
    assert files["same"] and files["listed"] and files["deleted"]
    name, status, message = files["refusal"]
    assert (name, status) == ("BadRequestError", 400) and "line 1" in message


def test_a_job_is_paused_resumed_and_cancelled(seen):
    steered = seen["steered"]
    assert steered["statuses"] == ["paused", "running", "cancelled"]
    before, later, resumed = steered["events"]
    assert before == later < resumed, "a paused job told of steps, or a running one did not"
    assert steered["again"][:2] == ["BadRequestError", 400] and "cancelled" in steered["again"][2]


def test_a_job_makes_a_model(seen, service):
    tuned = seen["tuned"]
    assert (tuned["status"], tuned["parent"], tuned["listed"]) == ("succeeded", "tiny", True)
    assert tuned["model"].startswith("ft:tiny:flexjax:mine:")
    assert tuned["steps"] == [1, 2, 3, 4] and tuned["losses"][-1] < tuned["losses"][0]
    assert list(tuned["checkpoints"]) == ["4", "2"] and tuned["results"].startswith("step,")
    learned = Answerer.exported(service.data / "adapters" / tuned["model"]).text(chat_ids(PROMPT), TOKENS)
    assert tuned["text"] == tuned["checkpoint_texts"][tuned["checkpoints"]["4"]] == learned != seen["chat"]["text"]


def test_a_deleted_model_is_gone(seen, service):
    removed = drive(f"openai{seen['version'][0]}", "with_openai.py", service.task | {"delete": seen["tuned"]["model"]})
    assert removed["deleted"] and removed["refusal"][:2] == ["NotFoundError", 404]
    assert not (service.data / "adapters" / seen["tuned"]["model"]).exists()
    assert seen["tuned"]["model"] in removed["refusal"][2]
