"""Bytes on the wire: framing of events, clients that vanish or read slowly, bodies that are no bodies."""

import json
import socket

import pytest

from tests.server.conftest import halted, halted_by_the_first_output, wait_until

LONG = {"model": "tiny", "prompt": "a", "max_tokens": 200, "temperature": 0, "ignore_eos": True}


def connect(server) -> socket.socket:
    return socket.create_connection((server.host, server.port), timeout=20)


def send(connection: socket.socket, body, path: str = "/v1/completions", **headers) -> None:
    """A request with a body, bytes or what becomes JSON."""
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    fields = {"Host": "x", "Content_Type": "application/json", "Content_Length": len(raw), **headers}
    lines = [f"POST {path} HTTP/1.1", *(f"{name.replace('_', '-')}: {value}" for name, value in fields.items())]
    connection.sendall("\r\n".join(lines).encode() + b"\r\n\r\n" + raw)


def answer(connection: socket.socket) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body, chunks joined."""
    file = connection.makefile("rb")
    status = int(file.readline().split()[1])
    headers = {}
    while line := file.readline().strip():
        name, _, value = line.decode().partition(": ")
        headers[name.lower()] = value
    if "content-length" in headers:
        return status, headers, file.read(int(headers["content-length"]))
    body = b""
    while size := int(file.readline(), 16):
        body += file.read(size)
        file.readline()
    return status, headers, body


def ask(server, body, path: str = "/v1/completions", **headers) -> tuple[int, dict[str, str], bytes]:
    with connect(server) as connection:
        send(connection, body, path, **headers)
        return answer(connection)


def test_events_are_framed_as_the_standard_has_it(server):
    status, headers, body = ask(server, LONG | {"max_tokens": 4, "stream": True}, X_Request_Id="mine-1")
    assert status == 200 and headers["content-type"] == "text/event-stream; charset=utf-8"
    assert headers["x-request-id"] == "mine-1" and headers["transfer-encoding"] == "chunked"
    *events, end = body.split(b"\n\n")
    assert end == b"" and events[-1] == b"data: [DONE]"
    assert all(event.startswith(b"data: ") and b"\n" not in event for event in events)
    chunks = [json.loads(event.removeprefix(b"data: ")) for event in events[:-1]]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks][-1] == "length"
    assert set(chunks[0]) == {"id", "object", "created", "model", "system_fingerprint", "choices"}


def running(engine) -> int:
    return engine.loop.call(lambda: engine.scheduler.statistics.running)


@pytest.mark.parametrize("stream", [True, False])
def test_the_row_of_a_client_that_vanishes_is_free_at_once(server, engine, stream):
    """The engine stands still while the client goes, so the request cannot have ended by itself."""
    aborted, tokens = server.service.totals.ended["abort"], server.service.totals.generation_tokens
    connection = connect(server)
    with halted_by_the_first_output(server) as told:
        send(connection, LONG | {"stream": stream, "n": 2})
        assert told.wait(20)
        connection.close()
        wait_until(lambda: server.service.admission.open == 0)
    wait_until(lambda: server.service.totals.ended["abort"] == aborted + 2)
    assert running(engine) == 0
    assert server.service.totals.generation_tokens - tokens < 10


def test_a_client_that_vanishes_while_it_waits_leaves_the_queue(server, engine):
    """Four sequences have all the rows for 200 iterations; nothing is computed for the fifth."""
    totals = server.service.totals
    aborted, tokens = totals.ended["abort"], totals.generation_tokens
    with connect(server) as patient, connect(server) as hasty:
        with halted(engine):
            send(patient, LONG | {"n": 4})
            wait_until(lambda: server.service.admission.open == 4)
            send(hasty, LONG)
            wait_until(lambda: server.service.admission.open == 5)
            hasty.close()
        wait_until(lambda: totals.ended["abort"] == aborted + 1)
        status, _, body = answer(patient)
    assert status == 200 and json.loads(body)["usage"]["completion_tokens"] == 800
    assert totals.generation_tokens == tokens + 800
    assert server.service.admission.open == 0 == running(engine)


def test_a_slow_reader_holds_up_nobody_and_loses_nothing(serving, engine):
    """Its answer is far larger than the buffers on the way (some are doubled or enlarged by the system)."""
    body = LONG | {"prompt": ["a", "b", "c", "d"] * 2, "n": 4, "logprobs": 20, "stream": True}
    with serving() as server:
        server.listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        slow = socket.socket()
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.settimeout(20)
        slow.connect((server.host, server.port))
        send(slow, body)
        wait_until(lambda: server.service.totals.ended["length"] == 32)
        status, _, quick = ask(server, LONG | {"max_tokens": 3})
        assert status == 200 and json.loads(quick)["usage"]["completion_tokens"] == 3
        assert server.service.admission.open == 32, "the slow answer was sent although nobody read it"
        status, _, events = answer(slow)
        slow.close()
    chunks = [json.loads(event[6:]) for event in events.split(b"\n\n")[:-2]]
    tokens = [len(chunk["choices"][0]["logprobs"]["tokens"]) for chunk in chunks]
    assert status == 200 and sum(tokens) == 32 * 200
    assert max(tokens) > 100, "what grew meanwhile comes in one piece"


@pytest.mark.parametrize(
    ("body", "headers", "status", "words"),
    [
        (b"{", {}, 400, "not valid JSON (line 1, column 2)"),
        (b"", {}, 400, "not valid JSON"),
        (b"\xff\xfe{", {}, 400, "not "),
        (b"[1]", {}, 400, "the body is a list"),
        (b'{"prompt": "a", "temperature": NaN}', {}, 400, "holds NaN"),
        (b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}", {}, 400, "digits"),
        (b'{"prompt": "\\ud800"}', {}, 400, "surrogate"),
        (b"[" * 100_000, {}, 400, "nested too deeply"),
        (b"{}", {"Content_Type": "text/plain"}, 415, "text/plain"),
        (b"prompt=a", {"Content_Type": "application/x-www-form-urlencoded"}, 415, "application/json"),
        (b'{"prompt": "a"}', {"Content_Length": 9 * 2**20}, 413, "max_body_bytes"),
    ],
)
def test_what_is_no_body_is_refused_with_openais_error(server, body, headers, status, words):
    got, sent, raw = ask(server, body, **headers)
    error = json.loads(raw)["error"]
    assert got == status and set(error) == {"message", "type", "param", "code"} and words in error["message"]
    assert error["type"] == "invalid_request_error" and len(sent["x-request-id"]) == 32


def test_a_body_that_does_not_say_its_length_has_the_same_limit(serving):
    with serving(max_body_bytes=1000) as server, connect(server) as connection:
        head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        connection.sendall(head.encode() + b"Transfer-Encoding: chunked\r\n\r\n" + b"200\r\n" + b" " * 512 + b"\r\n")
        connection.sendall(b"200\r\n" + b" " * 512 + b"\r\n")
        assert answer(connection)[0] == 413


@pytest.mark.parametrize(
    ("path", "status", "words"),
    [("/v1/nothing", 404, "no POST /v1/nothing here; /openapi.json"), ("/v1/models", 405, "takes GET, HEAD")],
)
def test_paths_and_methods_that_are_not_there(server, path, status, words):
    got, _, raw = ask(server, {}, path)
    error = json.loads(raw)["error"]
    assert got == status and set(error) == {"message", "type", "param", "code"} and words in error["message"]


def test_a_body_that_does_not_come_gives_its_room_back(server, monkeypatch):
    monkeypatch.setattr("flexjax.server.bodies.BODY_SECONDS", 0.2)
    with connect(server) as connection:
        send(connection, b'{"prompt"', Content_Length=1000)
        wait_until(lambda: server.service.admission.open == 1)
        status, headers, raw = answer(connection)
    assert status == 408 and json.loads(raw)["error"]["code"] == "body_too_slow" and headers["connection"] == "close"
    wait_until(lambda: server.service.admission.open == 0)


def test_a_client_that_vanishes_while_it_sends_is_no_error(server, caplog):
    connection = connect(server)
    send(connection, b'{"prompt"', Content_Length=1000)
    connection.close()
    assert ask(server, LONG | {"max_tokens": 1})[0] == 200
    wait_until(lambda: server.service.admission.open == 0)
    assert not [record for record in caplog.records if record.exc_info]


def test_every_request_leaves_a_line(server, caplog):
    caplog.set_level("INFO", logger="flexjax.requests")
    ask(server, LONG | {"max_tokens": 3, "n": 2}, X_Request_Id="line-7")
    ask(server, LONG | {"model": "ghost"}, X_Request_Id="a b")
    # a request of an earlier test may have ended only now
    lines = lambda: [json.loads(record.getMessage()) for record in caplog.records]
    ours = lambda: [line for line in lines() if line["request_id"] == "line-7" or line["status"] == 404]
    wait_until(lambda: len(ours()) == 2)
    first, second = sorted(ours(), key=lambda line: line["status"])
    assert first.pop("seconds") > 0
    assert first == {
        "request_id": "line-7",
        "method": "POST",
        "path": "/v1/completions",
        "status": 200,
        "adapter": None,
        "stream": False,
        "prompt_tokens": 1,
        "generated_tokens": 6,
        "finish_reasons": ["length", "length"],
    }
    assert second["status"] == 404 and len(second["request_id"]) == 32
    assert (second["param"], second["code"]) == ("model", "model_not_found")
