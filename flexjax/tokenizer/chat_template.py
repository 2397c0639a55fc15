"""ChatTemplate: messages to text, the way transformers renders a model's Jinja template. It knows no token ids."""

import json
from collections.abc import Sequence
from datetime import datetime

from jinja2 import TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

SUPPORTED_ROLES_HINT = 'each message must be an object such as {"role": "user", "content": "..."}'


class GenerationBlock(Extension):
    """Accepts ``{% generation %} ... {% endgeneration %}`` and renders what stands between."""

    tags = {"generation"}

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(["name:endgeneration"], drop_needle=True)


class ChatTemplate:
    """A compiled chat template.

    Args:
        source: the Jinja text.
        special_tokens: variables the template may use, such as ``bos_token`` and ``eos_token``.

    Raises:
        ValueError: the source is not a Jinja template.
    """

    def __init__(self, source: str, special_tokens: dict[str, str] | None = None):
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlock, loopcontrols]
        )
        environment.filters["tojson"] = to_json
        environment.globals["raise_exception"] = raise_exception
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        self._special_tokens = dict(special_tokens or {})
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise ValueError(f"the chat template is not valid: {error}") from error

    def render(self, messages: list[dict], add_generation_prompt: bool = False, **variables) -> str:
        """The conversation as text.

        Args:
            messages: objects with at least a ``role``, oldest first.
            add_generation_prompt: end with the header of an assistant turn, for a model to continue.
            variables: further names the template may use, such as ``tools``.

        Raises:
            ValueError: a message has no role, or the template refuses the conversation.
        """
        for index, message in enumerate(messages):
            if not isinstance(message, dict) or not isinstance(message.get("role"), str):
                raise ValueError(f"message {index} is {message!r}; {SUPPORTED_ROLES_HINT}")
        variables = {"tools": None, "documents": None} | self._special_tokens | variables
        try:
            return self._template.render(messages=messages, add_generation_prompt=add_generation_prompt, **variables)
        except (TemplateError, TypeError, KeyError, ValueError) as error:
            raise ValueError(f"the chat template refuses these messages: {error}; {SUPPORTED_ROLES_HINT}") from error

    def assistant_spans(
        self, messages: list[dict], learned: Sequence[bool] | None = None
    ) -> tuple[str, list[tuple[int, int]]]:
        """The whole conversation as text, and where in it the assistant speaks.

        A template does not mark its assistant text, so spans are derived: rendering the messages before an assistant
        message, with a generation prompt, gives what a model is shown; rendering one message more gives what it
        should have added.

            messages[:i] with prompt   <|user|>hi<|end|><|assistant|>
            messages[:i+1]             <|user|>hi<|end|><|assistant|>hello<|end|>
                                                                     ^^^^^^^^^^^^ span

        Args:
            learned: which messages are looked for; None is all.

        Returns:
            The text and, per assistant message that is looked for, (first character, one past the last).

        Raises:
            ValueError: a rendered prefix is not the beginning of the whole text (a template that rewrites earlier
                turns), so that no mask exists under which training matches serving.
        """
        text = self.render(messages)
        spans = []
        for index, message in enumerate(messages):
            if message["role"] != "assistant" or (learned is not None and not learned[index]):
                continue
            shown = self.render(messages[:index], add_generation_prompt=True)
            spoken = self.render(messages[: index + 1])
            if not (text.startswith(spoken) and spoken.startswith(shown)):
                raise ValueError(
                    f"the assistant's text in message {index} cannot be told apart: the chat template renders the "
                    'messages before it differently when more follow; train on everything (train_on = "all") or '
                    "give rows as prompt and completion"
                )
            spans.append((len(shown), len(spoken)))
        return text, spans


def to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    """The ``tojson`` of chat templates: Jinja's own would escape characters that matter in HTML only."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def raise_exception(message: str):
    raise TemplateError(message)
