"""/v1/chat/completions: conversations answered through the model's chat template."""

from collections.abc import Iterator
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from flexjax.request import RequestOutput
from flexjax.server.answer import Heading, usage_of
from flexjax.server.generation import Generation
from flexjax.server.logprobs import TokenTexts, chat_logprobs
from flexjax.server.pieces import Piece, Pieces
from flexjax.server.respond import respond
from flexjax.tokenizer import Tokenizer

CHUNK = "chat.completion.chunk"


class ChatAnswer:
    """Turns outputs into the objects of one answer."""

    def __init__(self, generation: Generation, tokenizer: Tokenizer | None, base_name: str):
        self._generation = generation
        self._heading = Heading("chatcmpl", "chat.completion", generation.request.adapter or base_name)
        self._pieces = Pieces(generation.count)
        self._texts = TokenTexts(tokenizer)

    def body(self) -> dict[str, Any]:
        """The whole answer, once all outputs have ended."""
        outputs = self._generation.outputs.newest
        choices = [self._message(index, self._pieces.take(index, output)) for index, output in enumerate(outputs)]
        return self._heading.object(choices) | {"usage": self.usage()}

    def opening(self) -> Iterator[dict[str, Any]]:
        """What a stream begins with: who speaks, in every choice."""
        delta = {"role": "assistant", "content": "", "refusal": None}
        for index in range(self._generation.count):
            yield self._chunk({"index": index, "delta": delta, "logprobs": None, "finish_reason": None})

    def chunks(self, index: int, output: RequestOutput) -> Iterator[dict[str, Any]]:
        """What a stream says of one output's growth; the reason of its end has a chunk of its own."""
        piece = self._pieces.take(index, output)
        logprobs = self._logprobs(piece)
        if piece.text or (logprobs and logprobs["content"]):
            delta = {"content": piece.text}
            yield self._chunk({"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": None})
        if piece.finish_reason is not None:
            reason = piece.finish_reason
            yield self._chunk({"index": index, "delta": {}, "logprobs": None, "finish_reason": reason})

    def closing(self) -> dict[str, Any]:
        """The last object of a stream that has the usage."""
        return self._heading.object([], CHUNK) | {"usage": self.usage()}

    def usage(self) -> dict[str, Any]:
        return usage_of(self._generation, self._pieces.tokens)

    def _chunk(self, choice: dict[str, Any]) -> dict[str, Any]:
        return self._heading.object([choice], CHUNK)

    def _message(self, index: int, piece: Piece) -> dict[str, Any]:
        return {
            "index": index,
            "message": {"role": "assistant", "content": piece.text, "refusal": None},
            "logprobs": self._logprobs(piece),
            "finish_reason": piece.finish_reason,
        }

    def _logprobs(self, piece: Piece) -> dict[str, Any] | None:
        if piece.logprobs is None:
            return None
        return chat_logprobs(self._texts, piece.token_ids, piece.logprobs, self._generation.request.sampling.logprobs)


async def create_chat_completion(request: Request) -> Response:
    return await respond(request, chat=True, answer_of=ChatAnswer)


ROUTES = (Route("/v1/chat/completions", create_chat_completion, methods=["POST"]),)
