"""LineServer: requests as lines of JSON in, answers as lines of JSON out, while the tokens come.

    in     {"id": "a", "prompt": "Once", "max_tokens": 3}
    out    {"id": "a", "index": 0, "token_ids": [403], "text": " upon", "finish_reason": null}
           ...
    in     nonsense
    out    {"line": 2, "error": "..."}

Every line out holds what is new since the last one of its id and index. Requests run side by side.
"""

import json
import queue
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, TextIO

import flexjax
from flexjax.request import RequestOutput
from flexjax.server.prompts import chat_encoder
from flexjax.server.protocol import is_chat, translate


@dataclass(eq=False)
class Answer:
    """What one line asked for, on its way.

    Attributes:
        growing: outputs that have not ended.
        rejected: the line turned out bad after some of it was submitted; nothing of it is written.
        sent: tokens and characters written so far, by index.
    """

    id: str | int
    growing: int
    rejected: bool = False
    sent: dict[int, tuple[int, int]] = field(default_factory=dict)

    def piece(self, index: int, output: RequestOutput) -> dict[str, Any]:
        """The line that says what is new in an output."""
        tokens, characters = self.sent.get(index, (0, 0))
        self.sent[index] = len(output.token_ids), len(output.text)
        line = {
            "id": self.id,
            "index": index,
            "token_ids": output.token_ids[tokens:],
            "text": output.text[characters:],
            "finish_reason": output.finish_reason,
        }
        if output.logprobs is not None:
            line["logprobs"] = output.logprobs[tokens : len(output.token_ids)]
        if output.prompt_logprobs is not None and output.finish_reason is not None:
            line["prompt_logprobs"] = output.prompt_logprobs
        if output.error is not None:
            line["error"] = output.error
        return line


@dataclass(frozen=True)
class PromptListener:
    """Takes the outputs of one prompt from the engine's thread; ``first`` is the index of the first of them."""

    answer: Answer
    first: int
    arrivals: queue.SimpleQueue

    def put(self, output: RequestOutput) -> None:
        self.arrivals.put((self.answer, self.first + output.index, output))


class LineServer:
    """A context manager: leaving it writes what has arrived, so close the engine first.

    Args:
        output: takes the lines; each is flushed.
    """

    def __init__(self, output: TextIO):
        self._output = output
        self._arrivals: queue.SimpleQueue = queue.SimpleQueue()
        self._open: dict[str | int, Answer] = {}
        self._changed = threading.Condition()  # held while a line is submitted, and while one is written
        self._failure: OSError | None = None
        self._writer = threading.Thread(target=self._write_arrivals, name="flexjax-lines", daemon=True)

    def __enter__(self) -> "LineServer":
        self._writer.start()
        return self

    def __exit__(self, *_) -> None:
        self._arrivals.put(None)
        self._writer.join()

    def serve(self, engine: "flexjax.Engine", lines: Iterable[bytes]) -> None:
        """Submit every line as it comes; return when the lines have ended and all answers are written.

        Raises:
            OSError: an answer cannot be written.
            EngineStopped: the engine's thread has died.
        """
        for number, line in enumerate(lines, 1):
            if self._failure is not None:
                break
            if line.strip():
                self._accept(engine, number, line)
        with self._changed:
            self._changed.wait_for(lambda: not self._open or self._failure is not None)
        if self._failure is not None:
            raise self._failure

    def _accept(self, engine: "flexjax.Engine", number: int, line: bytes) -> None:
        with self._changed:
            try:
                self._submit(engine, parse(line))
            except ValueError as error:
                self._write({"line": number, "error": str(error)})

    def _submit(self, engine: "flexjax.Engine", body: dict[str, Any]) -> None:
        identifier = self._free_id(body.pop("id", None))
        names = (engine.config.served_model_name, engine.config.model)
        request = translate(body, chat=is_chat(body), base_names=names, defaults=engine.defaults.sampling)
        prompts, n = request.encode(engine.encode, chat_encoder(engine)), request.sampling.n
        answer = Answer(identifier, growing=len(prompts) * n)
        submitted: list[int] = []
        try:
            for position, prompt in enumerate(prompts):
                listener = PromptListener(answer, position * n, self._arrivals)
                submitted += engine.submit(prompt, request.sampling, request.adapter, listener, request.priority)
        except ValueError:
            answer.rejected = True
            engine.cancel(submitted)
            raise
        self._open[identifier] = answer

    def _free_id(self, identifier: Any) -> str | int:
        if isinstance(identifier, bool) or not isinstance(identifier, str | int):
            raise ValueError(f"id is {identifier!r}; every line needs one, a text or a whole number")
        if identifier in self._open:
            raise ValueError(f"id {identifier!r} is in use by a request that has not ended; choose another")
        return identifier

    def _write_arrivals(self) -> None:
        """The writer's thread. After a failure it goes on without writing, so that nothing waits for it."""
        while (arrival := self._arrivals.get()) is not None:
            with self._changed:
                try:
                    self._write_piece(*arrival)
                except OSError as error:  # whoever read our lines has gone
                    self._failure = error
                self._changed.notify_all()

    def _write_piece(self, answer: Answer, index: int, output: RequestOutput) -> None:
        if answer.rejected or self._failure is not None:
            return
        if output.finish_reason is not None:
            answer.growing -= 1
        if not answer.growing:
            self._open.pop(answer.id, None)
        self._write(answer.piece(index, output))

    def _write(self, line: dict[str, Any]) -> None:
        self._output.write(json.dumps(line) + "\n")
        self._output.flush()


def parse(line: bytes) -> dict[str, Any]:
    """The object on a line. Raises ValueError."""
    try:
        body = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"the line is not UTF-8 (byte {error.start + 1})") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"the line is not valid JSON (column {error.colno}): {error.msg}") from error
    except RecursionError as error:
        raise ValueError("the line is nested too deeply") from error
    if not isinstance(body, dict):
        raise ValueError(f"the line holds a {type(body).__name__}; it must be an object")
    return body
