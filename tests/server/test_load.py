"""More than the service can take: refused at once, with a time to come back; and very many streams side by side."""

import asyncio
import json
import resource
import subprocess
import sys
import time
from collections import Counter

import openai
import pytest

from tests.server.conftest import halted, wait_until
from tests.server.crowd import PROMPTS
from tests.server.fault_record import TRIES, note
from tests.server.processes import ROOT

BODY = {"model": "tiny", "prompt": "a", "max_tokens": 2, "temperature": 0, "extra_body": {"ignore_eos": True}}
ROWS, STREAMS = 4, 500
SPARE_FILES = 1_000
"""That this process may open beside its ends of connections."""


def test_beyond_the_queue_requests_are_refused_and_may_come_again(serving, engine):
    async def rush(client, count):
        tasks = [asyncio.create_task(client.completions.create(**BODY)) for _ in range(count)]
        return await asyncio.gather(*tasks, return_exceptions=True)

    async def flood(server):
        async with server.async_client() as client:
            with halted(engine):
                waiting = asyncio.create_task(rush(client, ROWS + 3))
                while server.service.admission.open < ROWS + 3:
                    await asyncio.sleep(0.01)
                refused = await rush(client, 5)
            return await waiting, refused, await rush(client, 2)

    with serving(max_queue=3) as server:
        waiting, refused, later = asyncio.run(flood(server))
    assert all(answer.usage.completion_tokens == 2 for answer in waiting + later)
    assert {type(each) for each in refused} == {openai.RateLimitError}
    assert {each.response.headers["retry-after"] for each in refused} == {"1"}
    assert {each.code for each in refused} == {"overloaded"}


def test_what_can_never_fit_is_refused_for_good(serving):
    with serving(max_queue=3) as server, server.client() as client:
        with pytest.raises(openai.BadRequestError, match="asks for 8 sequences; max_queue"):
            client.completions.create(**BODY | {"n": 8})
        assert server.service.admission.open == 0


def test_refusals_leave_no_trace_in_the_count(server, client):
    for model in ("ghost", "tiny"):
        with pytest.raises(openai.APIStatusError):
            client.completions.create(**BODY | {"model": model, "prompt": [5] * (256 if model == "tiny" else 1)})
    assert server.service.admission.open == 0


async def stream(server, number: int) -> tuple[str, str]:
    """The text of one stream, over a connection of its own, and its last event."""
    reader, writer = await asyncio.open_connection(server.host, server.port)
    body = {"prompt": [number % 256], "max_tokens": 3, "temperature": 0, "ignore_eos": True, "stream": True}
    raw = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(raw)}\r\n"
    writer.write(head.encode() + b"Content-Type: application/json\r\n\r\n" + raw)
    lines = [line async for line in reader if line.startswith(b"data: ")]
    writer.close()
    chunks = [json.loads(line[6:]) for line in lines[:-1]]
    return "".join(chunk["choices"][0]["text"] for chunk in chunks), lines[-1].decode().strip()


def test_five_hundred_streams(server, engine):
    """All are open at once (the engine stands still until they are), and each has its own answer."""

    async def all_streams():
        with halted(engine):
            tasks = [asyncio.create_task(stream(server, number)) for number in range(STREAMS)]
            deadline = time.monotonic() + 30
            while server.service.admission.open < STREAMS:
                assert time.monotonic() < deadline, f"{server.service.admission.open} streams are open"
                await asyncio.sleep(0.02)
        return await asyncio.gather(*tasks)

    answers = asyncio.run(all_streams())
    expected = {number: stream_text for number, (stream_text, _) in enumerate(answers[:256])}
    assert {end for _, end in answers} == {"data: [DONE]"}
    assert [text for text, _ in answers[256:]] == [expected[number % 256] for number in range(256, STREAMS)]
    assert len(set(expected.values())) > 50, "answers to different prompts differ"
    wait_until(lambda: server.service.admission.open == 0)


def test_thousands_in_the_queue_are_answered_and_those_beyond_refused(serving, engine):
    """Ten thousand in `make test-faults`. The queue is filled while the engine stands still."""
    each, total = 100, min(10_000, 1_000 * TRIES)
    body = BODY | {"n": each, "max_tokens": 1}

    async def flood(server):
        async with server.async_client(timeout=300) as client:
            ask = lambda: asyncio.create_task(client.completions.create(**body))
            with halted(engine):
                waiting = [ask() for _ in range(total // each)]
                while server.service.admission.open < total:
                    await asyncio.sleep(0.01)
                refused = await asyncio.gather(*[ask() for _ in range(50)], return_exceptions=True)
            return await asyncio.gather(*waiting), refused

    with serving(max_queue=total - ROWS) as server:
        answers, refused = asyncio.run(flood(server))
        assert {type(each) for each in refused} == {openai.RateLimitError}
        choices = [choice for answer in answers for choice in answer.choices]
        assert len(choices) == total and len({choice.text for choice in choices}) == 1
        assert sum(answer.usage.completion_tokens for answer in answers) == total
        wait_until(lambda: server.service.admission.open == 0)
    note("queue", sequences=total, answered=len(choices), refused=len(refused) * each)


def crowd(server, count: int) -> subprocess.Popen:
    command = [sys.executable, "-m", "tests.server.crowd", server.host, str(server.port), str(count)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def came_of(process: subprocess.Popen) -> list[tuple[int, int, str, int]]:
    said, _ = process.communicate(timeout=540)
    assert process.returncode == 0
    return [tuple(each) for each in json.loads(said)]


def test_thousands_of_requests_on_connections_of_their_own(serving, engine):
    """Ten thousand in `make test-faults`, or as many as this process may open files: all are open at once, since the
    engine stands still until they are. Each is answered as its prompt asks for; those beyond the queue are refused."""
    allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    total, beyond = min(500 if TRIES == 1 else 10_000, allowed - SPARE_FILES), 100
    with serving(max_queue=total - ROWS) as server:
        with halted(engine):
            waiting = crowd(server, total)
            wait_until(lambda: server.service.admission.open == total, seconds=240)
            refused = came_of(crowd(server, beyond))
        answers = came_of(waiting)
        wait_until(lambda: server.service.admission.open == 0)
    assert {(status, code) for status, _, code, _ in refused} == {(429, "overloaded")}
    assert {status for status, *_ in answers} == {200} and sum(often for *_, often in answers) == total
    assert Counter(prompt for _, prompt, _, _ in answers) == Counter(range(PROMPTS)), "a prompt had two answers"
    assert len({text for _, _, text, _ in answers}) > PROMPTS / 4, "answers to different prompts differ"
    note("http queue", requests=total, answered=total, refused=beyond)
