"""``python -m tests.server.crowd HOST PORT COUNT`` sends so many completions, each over a connection of its own, all of
them open at once, and prints what came of them: [status, number of the prompt, text or code, how often], a JSON list.

It is a process of its own since the server's ends of the connections are open files too.
"""

import asyncio
import json
import sys
from collections import Counter

PROMPTS = 64
OPENING = 200
"""Connections that are being opened at once, fewer than the server's backlog."""


async def ask(host: str, port: int, number: int, opening: asyncio.Semaphore) -> tuple[int, int, str]:
    body = {"prompt": [number % PROMPTS], "max_tokens": 2, "temperature": 0, "ignore_eos": True}
    raw = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(raw)}\r\n"
    async with opening:
        reader, writer = await asyncio.open_connection(host, port)
        writer.write(head.encode() + b"Content-Type: application/json\r\n\r\n" + raw)
        await writer.drain()
    answer = await reader.read()
    writer.close()
    first, _, content = answer.partition(b"\r\n\r\n")
    said, status = json.loads(content), int(first.split()[1])
    return status, number % PROMPTS, said["choices"][0]["text"] if status == 200 else said["error"]["code"]


async def crowd(host: str, port: int, count: int) -> list:
    opening = asyncio.Semaphore(OPENING)
    answers = await asyncio.gather(*[ask(host, port, number, opening) for number in range(count)])
    return [[*answer, often] for answer, often in sorted(Counter(answers).items())]


if __name__ == "__main__":
    print(json.dumps(asyncio.run(crowd(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))))
