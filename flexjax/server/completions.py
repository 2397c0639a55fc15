"""/v1/completions: prompts continued, as OpenAI's API and vLLM's additions to it have it."""

from collections.abc import Iterator
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from flexjax.request import RequestOutput
from flexjax.server.answer import Heading, usage_of
from flexjax.server.generation import Generation
from flexjax.server.logprobs import TextPlaces, TokenTexts, completion_logprobs
from flexjax.server.pieces import Piece, Pieces
from flexjax.server.respond import respond
from flexjax.tokenizer import Tokenizer


class CompletionAnswer:
    """Turns outputs into the objects of one answer."""

    def __init__(self, generation: Generation, tokenizer: Tokenizer | None, base_name: str):
        self._generation, self._tokenizer = generation, tokenizer
        self._request, self._echo = generation.request, generation.delivery.echo
        self._heading = Heading("cmpl", "text_completion", self._request.adapter or base_name)
        self._pieces = Pieces(generation.count, silent=generation.delivery.prompt_only)
        self._texts = TokenTexts(tokenizer)
        self._places = [self._new_places(index) for index in range(generation.count)]

    def body(self) -> dict[str, Any]:
        """The whole answer, once all outputs have ended."""
        outputs, take = self._generation.outputs.newest, self._pieces.take
        choices = [self._choice(index, output, take(index, output)) for index, output in enumerate(outputs)]
        return self._heading.object(choices) | {"usage": self.usage()}

    def opening(self) -> Iterator[dict[str, Any]]:
        """What a stream begins with: nothing."""
        return iter(())

    def chunks(self, index: int, output: RequestOutput) -> Iterator[dict[str, Any]]:
        """What a stream says of one output's growth."""
        piece = self._pieces.take(index, output)
        if not piece.empty or (piece.first and self._echo):
            yield self._heading.object([self._choice(index, output, piece)])

    def closing(self) -> dict[str, Any]:
        """The last object of a stream that has the usage."""
        return self._heading.object([]) | {"usage": self.usage()}

    def usage(self) -> dict[str, Any]:
        return usage_of(self._generation, self._pieces.tokens)

    def _choice(self, index: int, output: RequestOutput, piece: Piece) -> dict[str, Any]:
        echo = piece.first and self._echo
        return {
            "index": index,
            "text": (self._prompt_text(index) if echo else "") + piece.text,
            "logprobs": None if piece.logprobs is None else self._logprobs(index, output, piece, echo),
            "finish_reason": piece.finish_reason,
        }

    def _logprobs(self, index: int, output: RequestOutput, piece: Piece, echo: bool) -> dict[str, list]:
        ids, entries = piece.token_ids, piece.logprobs
        if echo:
            ids, entries = output.prompt_token_ids + ids, output.prompt_logprobs + entries
        return completion_logprobs(self._texts, self._places[index], ids, entries)

    def _prompt_text(self, index: int) -> str:
        """The prompt of a sequence, as it was written."""
        position = index // self._request.sampling.n
        prompt = self._request.prompts[position]
        if isinstance(prompt, str):
            return prompt
        if self._tokenizer is None:
            return ""
        return self._tokenizer.decode(prompt, self._request.sampling.skip_special_tokens)

    def _new_places(self, index: int) -> TextPlaces:
        prompt = () if self._echo else self._generation.prompts[index // self._request.sampling.n]
        return TextPlaces(self._tokenizer, self._request.sampling.skip_special_tokens, prompt)


async def create_completion(request: Request) -> Response:
    return await respond(request, chat=False, answer_of=CompletionAnswer)


ROUTES = (Route("/v1/completions", create_completion, methods=["POST"]),)
