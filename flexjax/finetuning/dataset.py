"""Rows of text or token ids become examples: token ids and a loss mask. It knows no batches and no model."""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from numbers import Integral
from typing import Any, Protocol

import numpy as np

from flexjax.config import nearest
from flexjax.fields import ConfigError

MAX_PROBLEMS = 20
KINDS = (("messages",), ("prompt", "completion"), ("input_ids", "loss_mask"))
ROLES = ("system", "user", "assistant", "tool", "developer")
MESSAGE_KEYS = {"role", "content"}, {"role", "content", "weight"}


class DatasetError(ConfigError):
    """Rows that cannot be trained on; the message lists up to 20 of them by file and line."""


class RowError(ValueError):
    """What is wrong with one row."""


class RowTokenizer(Protocol):
    """The part of a tokenizer that rows need. Both chat methods raise ValueError for a chat that the template
    refuses; ``assistant_mask`` marks the tokens an assistant writes in messages to be learned, the one that ends its
    turn included."""

    eos_token_id: int | None

    def encode(self, text: str, add_special_tokens: bool) -> list[int]: ...

    def apply_chat_template(self, messages: list[dict], add_generation_prompt: bool) -> list[int]: ...

    def assistant_mask(self, messages: list[dict], learned: Sequence[bool]) -> tuple[list[int], list[int]]: ...


@dataclass(frozen=True, eq=False)
class Example:
    """One row as the model sees it.

    Attributes:
        input_ids: int32 [tokens].
        loss_mask: bool [tokens], whether the model is trained to say this token; False for the first, which
            nothing predicts.
        line: 1-based line of the file, or number of the row.
    """

    input_ids: np.ndarray
    loss_mask: np.ndarray
    line: int

    @cached_property
    def trained_tokens(self) -> int:
        return int(np.count_nonzero(self.loss_mask))

    @cached_property
    def computed_tokens(self) -> int:
        """Tokens that go through the model: all before the last trained one. Attention is causal, so what stands
        after has no part in the loss, and the last trained token itself is only ever a target."""
        return int(np.flatnonzero(self.loss_mask)[-1])


@dataclass(frozen=True, eq=False)
class Dataset:
    """Examples in the order of the file.

    Attributes:
        source: how messages name it, a path or "data".
        truncated: rows that were longer than ``max_length``.
    """

    source: str
    examples: tuple[Example, ...]
    truncated: int

    @property
    def tokens(self) -> int:
        return sum(len(each.input_ids) for each in self.examples)

    @property
    def trained_tokens(self) -> int:
        return sum(each.trained_tokens for each in self.examples)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of every token and mask: a job may only resume on the data it began with."""
        digest = hashlib.sha256()
        for each in self.examples:
            digest.update(len(each.input_ids).to_bytes(8, "little"))
            digest.update(each.input_ids.tobytes() + each.loss_mask.tobytes())
        return digest.hexdigest()


def read_dataset(
    data: str | os.PathLike | Iterable[Mapping[str, Any]],
    tokenizer: RowTokenizer | None,
    *,
    vocab_size: int,
    max_length: int,
    train_on: str,
) -> Dataset:
    """Reads all rows; those longer than ``max_length`` tokens are cut off there.

    Args:
        vocab_size: of the model; token ids are smaller.
        train_on: "assistant" or "all", as in `FinetuneJob`.

    Raises:
        DatasetError: the file cannot be read, there is no row, or rows are malformed, hold a token outside the
            vocabulary or have no trained token; up to 20 rows are listed.
    """
    is_file = isinstance(data, str | os.PathLike)
    source, unit = (os.fspath(data), "line") if is_file else ("data", "row")
    examples, problems, truncated = [], [], 0
    for line, row in read_lines(source) if is_file else enumerate(data, 1):
        try:
            ids, mask = encode_row(parse_row(row) if is_file else row, tokenizer, train_on)
            examples.append(make_example(ids, mask, line, vocab_size, max_length))
            truncated += len(ids) > max_length
        except RowError as error:
            problems.append(f"{source}, {unit} {line}: {error}")
    if problems:
        raise DatasetError(list_problems(problems, source, len(examples) + len(problems)))
    if not examples:
        raise DatasetError(f"{source} holds no rows; a finetuning job needs at least one")
    return Dataset(source, tuple(examples), truncated)


def read_lines(path: str) -> Iterator[tuple[int, bytes]]:
    """Lines that are not blank, with their 1-based numbers; not decoded yet, so that a bad byte has a line."""
    try:
        with open(path, "rb") as file:
            yield from ((number, line) for number, line in enumerate(file, 1) if line.strip())
    except OSError as error:
        raise DatasetError(f"cannot read the data {path}: {error.strerror}") from error


def list_problems(problems: list[str], source: str, rows: int) -> str:
    shown = problems[:MAX_PROBLEMS]
    more = [f"... and {len(problems) - len(shown)} more"] if len(problems) > len(shown) else []
    if len(problems) == 1:
        return problems[0]
    return "\n  ".join([f"{len(problems)} of {rows} rows of {source} cannot be used:", *shown, *more])


def parse_row(line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise RowError(f"not UTF-8 (byte {error.start + 1} of the line)") from error
    except json.JSONDecodeError as error:
        raise RowError(f"not valid JSON (column {error.colno}): {error.msg}") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets thousands deep
        raise RowError(f"not readable as JSON: {error}") from error


def encode_row(row: Any, tokenizer: RowTokenizer | None, train_on: str) -> tuple[Sequence[int], Sequence[bool]]:
    """Token ids and loss mask of a row of any kind.

    Raises:
        RowError: unknown or missing keys, wrong types, a chat that the template refuses.
    """
    kind = row_kind(row)
    if "input_ids" in kind:
        return token_row(row)
    if tokenizer is None:
        raise RowError("a row of text, but the model has no tokenizer; give input_ids and loss_mask")
    if "messages" in kind:
        return encode_messages(row["messages"], tokenizer, train_on)
    return encode_completion(row, tokenizer, train_on)


def row_kind(row: Any) -> tuple[str, ...]:
    if not isinstance(row, Mapping):
        raise RowError(f"a row must be an object, not {type(row).__name__}")
    for kind in KINDS:
        if set(row) == set(kind):
            return kind
    forms = " or ".join("{" + ", ".join(kind) + "}" for kind in KINDS)
    names = [name for kind in KINDS for name in kind]
    unknown = [f"{key!r}{nearest(str(key), names)}" for key in row if key not in names]
    problem = f"unknown key {', '.join(unknown)}" if unknown else f"keys are {', '.join(row) or 'absent'}"
    raise RowError(f"{problem}; a row is {forms}")


def encode_messages(messages: Any, tokenizer: RowTokenizer, train_on: str) -> tuple[list[int], list]:
    """OpenAI's weights of an assistant's messages, 0 or 1, say which are learned; "developer" is the newer word for
    "system"."""
    check_messages(messages)
    learned = [message.get("weight") != 0 for message in messages]
    roles = ["system" if message["role"] == "developer" else message["role"] for message in messages]
    messages = [{"role": role, "content": each["content"]} for role, each in zip(roles, messages, strict=True)]
    try:
        if train_on == "assistant":
            return tokenizer.assistant_mask(messages, learned)
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=False)
    except ValueError as error:
        raise RowError(str(error)) from error
    return ids, [True] * len(ids)


def check_messages(messages: Any) -> None:
    if not isinstance(messages, list | tuple) or not messages:
        raise RowError("messages must be a list of at least one message")
    for number, message in enumerate(messages, 1):
        if not isinstance(message, Mapping) or set(message) not in MESSAGE_KEYS:
            raise RowError(f"message {number} must be an object with the keys role and content or weight, and no other")
        if message["role"] not in ROLES:
            raise RowError(f"message {number} has the role {message['role']!r}; it must be one of {', '.join(ROLES)}")
        if not isinstance(message["content"], str):
            raise RowError(f"message {number}: content must be text, not {type(message['content']).__name__}")
        check_weight(number, message)


def check_weight(number: int, message: Mapping[str, Any]) -> None:
    weight = message.get("weight")
    if weight is not None and (message["role"] != "assistant" or not is_whole(weight) or weight not in (0, 1)):
        raise RowError(f"message {number}: weight is {weight!r}; only an assistant's message has one, which is 0 or 1")


def encode_completion(row: Mapping[str, Any], tokenizer: RowTokenizer, train_on: str) -> tuple[list[int], list]:
    """The completion and the end token are trained, and with "all" the prompt."""
    for key in ("prompt", "completion"):
        if not isinstance(row[key], str):
            raise RowError(f"{key} must be text, not {type(row[key]).__name__}")
    if not row["completion"]:
        raise RowError("completion is empty; there is nothing to train")
    prompt = tokenizer.encode(row["prompt"], add_special_tokens=True)
    completion = tokenizer.encode(row["completion"], add_special_tokens=False)
    completion = [*completion, *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])]
    return [*prompt, *completion], [train_on == "all"] * len(prompt) + [True] * len(completion)


def token_row(row: Mapping[str, Any]) -> tuple[list[int], list[bool]]:
    ids, mask = (
        each.tolist() if isinstance(each, np.ndarray) else each for each in (row["input_ids"], row["loss_mask"])
    )
    if not isinstance(ids, list | tuple) or not all(map(is_whole, ids)):
        raise RowError("input_ids must be a list of whole numbers")
    if not isinstance(mask, list | tuple) or any(each not in (0, 1) for each in mask):
        raise RowError("loss_mask must be a list of true or false, or of 1 and 0")
    if len(ids) != len(mask):
        raise RowError(f"input_ids has {len(ids)} entries and loss_mask {len(mask)}; they must be equally long")
    return ids, mask


def is_whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def make_example(ids: Sequence[int], mask: Sequence[bool], line: int, vocab_size: int, max_length: int) -> Example:
    outside = [each for each in ids if not 0 <= each < vocab_size]
    if outside:
        raise RowError(f"token id {outside[0]} is outside the vocabulary of {vocab_size} tokens")
    loss_mask = np.asarray(mask[:max_length], dtype=bool)
    loss_mask[:1] = False
    if not loss_mask.any():
        cut = f" within the first {max_length} of {len(ids)} tokens (max_length)" if len(ids) > max_length else ""
        raise RowError(f"no trained token{cut}; the first token of a row does not count, since nothing predicts it")
    return Example(np.asarray(ids[:max_length], dtype=np.int32), loss_mask, line)
