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


def usage_of(generation: Generation, completion_tokens: int) -> dict[str, int]:
    """Every prompt counts once, whatever n is."""
    prompt_tokens = sum(map(len, generation.prompts))
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }
