"""Delivery: how an HTTP body wants its answer brought. What it wants generated is protocol's part."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flexjax.config import nearest
from flexjax.server.prompts import BodyError
from flexjax.server.protocol import typed

STREAM_OPTIONS = ("include_usage", "continuous_usage_stats", "include_obfuscation")


@dataclass(frozen=True)
class Delivery:
    """Attributes:
    stream: as server-sent events, while the tokens come.
    usage: a last event has the usage.
    running_usage: every event has it.
    echo: the prompt stands before the text.
    prompt_only: nothing is wanted but the prompt (echo with max_tokens 0).
    """

    stream: bool = False
    usage: bool = False
    running_usage: bool = False
    echo: bool = False
    prompt_only: bool = False


def split_delivery(body: Mapping[str, Any], chat: bool) -> tuple[Delivery, dict[str, Any]]:
    """A body's delivery, and the body that remains for `translate`. Raises BodyError."""
    rest = dict(body)
    stream = typed("stream", rest.get("stream") or False, bool)
    options = stream_options(rest.pop("stream_options", None), stream)
    if rest.get("prompt_logprobs") is not None:
        message = "prompt_logprobs is not supported over HTTP; echo with logprobs gives those of the prompt"
        raise BodyError(message, "prompt_logprobs")
    echo = False if chat else typed("echo", rest.pop("echo", None) or False, bool)
    prompt_only = echo and rest.get("max_tokens") == 0
    if prompt_only:
        rest["max_tokens"] = 1  # the least that the engine computes; it is not shown
    if echo:
        rest["prompt_logprobs"] = rest.get("logprobs")
    usage, running = options.get("include_usage", False), options.get("continuous_usage_stats", False)
    return Delivery(stream, usage or running, running, echo, prompt_only), rest


def stream_options(options: Any, stream: bool) -> dict[str, bool]:
    """Checked; null, and options that are null, ask for nothing."""
    if options is None:
        return {}
    if not stream:
        raise BodyError("stream_options needs stream to be true", "stream_options")
    given = {name: value for name, value in typed("stream_options", options, Mapping).items() if value is not None}
    for name, value in given.items():
        if name not in STREAM_OPTIONS:
            raise BodyError(f"unknown field stream_options.{name}{nearest(name, STREAM_OPTIONS)}", "stream_options")
        typed(f"stream_options.{name}", value, bool)
    return given
