"""Heading and usage: what completions and chats have in common."""

import time
import uuid
from dataclasses import dataclass, field
from typing import Any

from flexjax.server.generation import Generation


@dataclass(frozen=True)
class Heading:
    """The fields that open every object of one answer."""

    prefix: str
    kind: str
    model: str
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def object(self, choices: list[dict], kind: str | None = None) -> dict[str, Any]:
        return {
            "id": f"{self.prefix}-{self.id}",
            "object": kind or self.kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": None,
            "choices": choices,
        }


def usage_of(generation: Generation, completion_tokens: int) -> dict[str, Any]:
    """Every prompt counts once, whatever n is: as its first sample found it."""
    prompt_tokens = sum(map(len, generation.prompts))
    firsts = generation.outputs.newest[:: generation.request.sampling.n]
    cached = sum(each.cached_tokens or 0 for each in firsts if each is not None)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached},
    }
