"""GenerationRequest: an OpenAI completions or chat body, translated once into what the engine takes.

It knows no transport and no engine. Besides OpenAI's fields it takes those that vLLM adds; what is not implemented is
refused by name, unless it has the value that asks for nothing.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from flexjax.config import nearest
from flexjax.fields import MISMATCH, convert, describe
from flexjax.request import SamplingError, SamplingParams
from flexjax.server.prompts import BodyError, kind_of, messages_of, prompts_of

SAMPLING_FIELDS = MappingProxyType(
    {
        "n": int,
        "temperature": float,
        "top_p": float,
        "presence_penalty": float,
        "frequency_penalty": float,
        "seed": int,
        "stop": str | tuple[str, ...],
        "max_tokens": int,
        "top_k": int,
        "min_p": float,
        "repetition_penalty": float,
        "stop_token_ids": tuple[int, ...],
        "ignore_eos": bool,
        "min_tokens": int,
        "prompt_logprobs": int,
        "include_stop_str_in_output": bool,
        "skip_special_tokens": bool,
    }
)
"""Fields that are `SamplingParams` under the same name, with their types."""

OTHER_FIELDS = MappingProxyType({"model": str, "priority": int, "stream": bool})
WITHOUT_EFFECT = MappingProxyType(
    {
        "user": str,
        "metadata": Mapping,
        "stream_options": Mapping,
        "safety_identifier": str,
        "prompt_cache_key": str,
        "prompt_cache_retention": str,
        "prompt_cache_options": Mapping,
    }
)
"""Accepted, since nothing that is generated depends on them."""

COMPLETION_FIELDS = MappingProxyType({"prompt": Any, "logprobs": int})
CHAT_FIELDS = MappingProxyType({"messages": Any, "logprobs": bool, "top_logprobs": int, "max_completion_tokens": int})

UNSUPPORTED = MappingProxyType(
    {
        "suffix": ("",),
        "echo": (False,),
        "best_of": (1,),
        "logit_bias": ({},),
        "tools": ([],),
        "tool_choice": ("none", "auto"),
        "parallel_tool_calls": (True, False),
        "functions": ([],),
        "function_call": ("none", "auto"),
        "response_format": ({"type": "text"},),
        "modalities": (["text"],),
        "store": (False,),
        "service_tier": ("auto", "default"),
        "audio": (),
        "prediction": (),
        "reasoning_effort": (),
        "verbosity": (),
        "web_search_options": (),
        "moderation": (),
        "use_beam_search": (False,),
        "length_penalty": (1.0, 1),
        "bad_words": ([],),
        "allowed_token_ids": (),
        "truncate_prompt_tokens": (),
        "structured_outputs": (),
        "spaces_between_special_tokens": (True,),
        "return_token_ids": (False,),
        "chat_template": (),
        "chat_template_kwargs": ({},),
        "add_generation_prompt": (True,),
        "continue_final_message": (False,),
        "cache_salt": (),
    }
)
"""OpenAI's fields that are not implemented, then vLLM's, each with the values that ask for nothing (null is always
one)."""


@dataclass(frozen=True)
class GenerationRequest:
    """What one body asks for.

    Attributes:
        prompts: text or token ids of each prompt; empty for a chat.
        messages: the conversation of a chat, every content a string; empty otherwise.
        adapter: name of the adapter, None for the base model.
        priority: smaller is served first.
        stream: the caller wants tokens as they come.
    """

    prompts: tuple[str | list[int], ...]
    messages: tuple[dict[str, str], ...]
    sampling: SamplingParams
    adapter: str | None
    priority: int
    stream: bool

    def encode(self, encode_text: Callable[[str | list[int]], list[int]], encode_chat: Callable) -> list[list[int]]:
        """Token ids of every prompt; a chat is one prompt.

        Args:
            encode_text: from a text or token ids; encode_chat: from a list of messages.
        """
        if self.messages:
            return [encode_chat(list(self.messages))]
        return [encode_text(prompt) for prompt in self.prompts]


def is_chat(body: Any) -> bool:
    """Whether a body is a chat, by what it holds. Raises BodyError if that does not tell."""
    if not isinstance(body, Mapping):
        raise BodyError(f"the body is {kind_of(body)}; it must be an object")
    present = [name for name in ("prompt", "messages") if body.get(name) is not None]
    if len(present) != 1:
        found = " and ".join(present) or "neither"
        raise BodyError(f"the body has {found}; it needs either prompt (a completion) or messages (a chat)")
    return present == ["messages"]


def translate(
    body: Mapping[str, Any], *, chat: bool, base_names: Collection[str], defaults: Mapping[str, Any]
) -> GenerationRequest:
    """What a body asks for.

    Args:
        chat: it came as a chat, not as a completion.
        base_names: names of the base model; any other is an adapter's, and a body without one means the base model.
        defaults: fields of `SamplingParams` that the model's makers recommend.

    Raises:
        ValueError: a field is unknown, not supported, of the wrong type or outside its range (BodyError names it).
    """
    values = checked_values(body, CHAT_FIELDS if chat else COMPLETION_FIELDS)
    given = {name: values[name] for name in SAMPLING_FIELDS if name in values}
    given |= chat_sampling(values) if chat else completion_sampling(values)
    lengths = {"max_tokens": None} if chat else {}
    model = values.get("model")
    return GenerationRequest(
        prompts=() if chat else prompts_of(values.get("prompt")),
        messages=messages_of(values.get("messages")) if chat else (),
        sampling=sampling_of({**lengths, **defaults, **given}, spelling_of(values) if chat else {}),
        adapter=None if model in base_names else model,
        priority=values.get("priority", 0),
        stream=values.get("stream", False),
    )


def sampling_of(values: Mapping[str, Any], spelling: Mapping[str, str]) -> SamplingParams:
    """Args:
        spelling: fields that the body calls otherwise.

    Raises:
        BodyError: a value is outside its range.
    """
    try:
        return SamplingParams(**values)
    except SamplingError as error:
        name = spelling.get(error.field, error.field)
        raise BodyError(f"{name} {error.fault}", name) from error


def checked_values(body: Any, own_fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a body that have a value, in their types; nulls and what asks for nothing are left out."""
    if not isinstance(body, Mapping):
        raise BodyError(f"the body is {kind_of(body)}; it must be an object")
    hints = {**SAMPLING_FIELDS, **OTHER_FIELDS, **WITHOUT_EFFECT, **own_fields}
    values = {}
    for name, value in body.items():
        if name in UNSUPPORTED:
            require_neutral(name, value)
        elif name not in hints:
            raise BodyError(f"unknown field {name!r}{nearest(name, [*hints, *UNSUPPORTED])}", name)
        elif value is not None:
            values[name] = typed(name, value, hints[name])
    return values


def require_neutral(name: str, value: Any) -> None:
    neutral = UNSUPPORTED[name]
    if value is None or any(value == each and type(value) is type(each) for each in neutral):
        return
    hint = "; prompt_logprobs gives log-probabilities of the prompt" if name == "echo" else ""
    raise BodyError(f"{name} is {value!r}, which is not supported{hint}", name)


def typed(name: str, value: Any, hint: Any) -> Any:
    converted = convert(value, hint)
    if converted is MISMATCH:
        raise BodyError(f"{name} is {value!r}; it must be {describe(hint)}", name)
    return converted


def completion_sampling(values: Mapping[str, Any]) -> dict[str, Any]:
    return {"logprobs": values["logprobs"]} if "logprobs" in values else {}


def spelling_of(values: Mapping[str, Any]) -> dict[str, str]:
    """What a chat calls fields of `SamplingParams`."""
    lengths = {"max_tokens": "max_completion_tokens"} if "max_completion_tokens" in values else {}
    return {"logprobs": "top_logprobs", **lengths}


def chat_sampling(values: Mapping[str, Any]) -> dict[str, Any]:
    """Fields that chats spell in their own way: logprobs with top_logprobs, max_completion_tokens."""
    sampling = {}
    if values.get("logprobs"):
        sampling["logprobs"] = values.get("top_logprobs", 0)
    elif values.get("top_logprobs"):
        raise BodyError(f"top_logprobs is {values['top_logprobs']}; it needs logprobs to be true", "top_logprobs")
    if "max_completion_tokens" in values:
        sampling["max_tokens"] = values["max_completion_tokens"]
        if values.get("max_tokens", sampling["max_tokens"]) != sampling["max_tokens"]:
            message = "max_tokens and max_completion_tokens differ; give one of them"
            raise BodyError(message, "max_completion_tokens")
    return sampling
