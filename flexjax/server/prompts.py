"""What a body wants continued: texts, token ids or a conversation, checked and brought into one form."""

from collections.abc import Mapping, Sequence
from typing import Any

import flexjax
from flexjax.config import nearest

ROLES = ("system", "developer", "user", "assistant")
MESSAGE_KEYS = ("role", "content", "name")


class BodyError(ValueError):
    """A body that cannot be answered.

    Attributes:
        field: the field at fault, None where it is the body as a whole.
    """

    def __init__(self, message: str, field: str | None = None):
        super().__init__(message)
        self.field = field


def prompts_of(value: Any) -> tuple[str | list[int], ...]:
    """A text, a list of texts, token ids, or a list of lists of them, as a tuple of prompts."""
    if isinstance(value, str):
        return (value,)
    if isinstance(value, list) and value:
        if all(isinstance(each, str) for each in value):
            return tuple(value)
        if are_token_ids(value):
            return (value,)
        if all(isinstance(each, list) and are_token_ids(each) for each in value):
            return tuple(value)
    message = f"prompt is {shortened(value)}; it must be a text or a list of token ids, or a list of several, not empty"
    raise BodyError(message, "prompt")


def are_token_ids(value: Sequence) -> bool:
    return bool(value) and all(isinstance(each, int) and not isinstance(each, bool) for each in value)


def messages_of(value: Any) -> tuple[dict[str, str], ...]:
    if not isinstance(value, list) or not value:
        raise BodyError(f"messages is {shortened(value)}; it must be a list of one or more messages", "messages")
    return tuple(message_of(message, index) for index, message in enumerate(value))


def message_of(message: Any, index: int) -> dict[str, str]:
    """One message as chat templates take it; "developer" is the newer word for "system"."""
    where = f"message {index}"
    if not isinstance(message, Mapping):
        raise BodyError(f"{where} is {kind_of(message)}; it must be an object with role and content", "messages")
    extra = [key for key, value in message.items() if key not in MESSAGE_KEYS and value is not None]
    if extra:
        hint = nearest(extra[0], MESSAGE_KEYS)
        raise BodyError(f"{where} has {extra[0]!r}, which is not supported{hint}", "messages")
    role = message.get("role")
    if role not in ROLES:
        raise BodyError(f"{where} has the role {role!r}; roles are {', '.join(ROLES)}", "messages")
    if not isinstance(message.get("name"), str | None):
        raise BodyError(f"{where} has the name {shortened(message['name'])}; it must be a text", "messages")
    values = {key: message[key] for key in message if key in MESSAGE_KEYS and message[key] is not None}
    return values | {"role": "system" if role == "developer" else role, "content": text_of(message, where)}


def text_of(message: Mapping[str, Any], where: str) -> str:
    """The content: a text, or a list of parts of which all are text."""
    content = message.get("content")
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise BodyError(f"{where} has content {shortened(content)}; it must be a text or a list of parts", "messages")
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else kind_of(part)
        if kind != "text" or not isinstance(part.get("text"), str):
            raise BodyError(f"{where} has a part of type {kind!r}; only text is supported", "messages")
    return "".join(part["text"] for part in content)


def kind_of(value: Any) -> str:
    """A JSON value's kind in words."""
    if value is None:
        return "null"
    names = {bool: "a boolean", str: "a text", list: "a list", dict: "an object"}
    return names.get(type(value), "a number")


def shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def chat_encoder(engine: "flexjax.Engine"):
    """From messages to token ids."""
    if engine.tokenizer is None:
        return refuse_chat
    return engine.tokenizer.apply_chat_template


def refuse_chat(_: list[dict]):
    raise ValueError("the model was loaded without a tokenizer (load_format is dummy); give token ids as prompt")
