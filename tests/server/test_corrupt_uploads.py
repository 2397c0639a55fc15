"""Uploads whose bytes were changed on the way: each is kept whole or refused, and nothing else is left."""

import random

import httpx

from tests.server.fault_record import TRIES, note
from tests.server.jobs import ROWS, jsonl

UPLOADS = 60 * TRIES


def form() -> tuple[bytes, str]:
    """A body as a client sends it, and its content type."""
    files = {"file": ("rows.jsonl", jsonl(ROWS)), "purpose": (None, "fine-tune")}
    request = httpx.Request("POST", "http://x", files=files)
    return request.read(), request.headers["content-type"]


def damaged(body: bytes, turn: random.Random) -> bytes:
    """A few bytes changed, a piece lost, doubled or put in, or the end cut off."""
    changed, place = bytearray(body), turn.randrange(len(body))
    piece = slice(place, place + turn.randrange(1, 200))
    match turn.randrange(5):
        case 0:
            for _ in range(turn.randrange(1, 8)):
                changed[turn.randrange(len(body))] = turn.randrange(256)
        case 1:
            del changed[piece]
        case 2:
            changed[place:place] = changed[piece]
        case 3:
            changed[place:place] = turn.randbytes(turn.randrange(1, 50))
        case 4:
            del changed[place:]
    return bytes(changed)


def test_an_upload_is_kept_whole_or_refused(serving):
    turn, (body, kind) = random.Random(11), form()
    with serving() as server, httpx.Client(base_url=server.url, timeout=20) as client:
        kept, refused = [], 0
        for _ in range(UPLOADS):
            answer = client.post("/v1/files", content=damaged(body, turn), headers={"Content-Type": kind})
            assert answer.status_code == 200 or 400 <= answer.status_code < 500, answer.text
            if answer.status_code == 200:
                kept.append(answer.json())
            else:
                refused += 1
                assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
        listed = client.get("/v1/files", params={"limit": 10_000, "order": "asc"}).json()["data"]
        assert listed == kept
        for file in kept:
            content = client.get(f"/v1/files/{file['id']}/content").content
            assert len(content) == file["bytes"]
        on_disk = sorted(file.name for file in (server.service.folder.root / "files").iterdir())
        assert on_disk == sorted(file["id"] for file in kept)
        assert client.post("/v1/files", content=body, headers={"Content-Type": kind}).status_code == 200
    assert kept and refused, "the damage was always or never noticed"
    note("corrupt upload", uploads=UPLOADS, kept=len(kept), refused=refused)
