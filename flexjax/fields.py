"""Types and ranges of the fields of frozen dataclasses. It knows none of them, nor where values come from."""

import math
import types
import typing
from numbers import Integral, Real
from typing import Any, Literal


class ConfigError(ValueError):
    """A user's mistake: the message names the value, the limit and the knob, and is shown without a traceback."""


def check_types(config: Any) -> None:
    """Checks every field of a frozen dataclass against its annotation; lists become tuples, whole numbers floats.

    Raises:
        ConfigError: a field has another type; the message names field, value and what it must be.
    """
    for name, hint in typing.get_type_hints(type(config)).items():
        value = getattr(config, name)
        converted = convert(value, hint)
        if converted is MISMATCH:
            raise ConfigError(f"{name} is {value!r}; it must be {describe(hint)}")
        object.__setattr__(config, name, converted)


MISMATCH = object()


def convert(value: Any, hint: Any) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (types.UnionType, typing.Union):
        candidates = (convert(value, arm) for arm in arguments)
        return next((each for each in candidates if each is not MISMATCH), MISMATCH)
    if origin is Literal:
        return value if isinstance(value, str) and value in arguments else MISMATCH
    if origin is tuple:
        return convert_items(value, arguments)
    if hint in (int, float):
        return convert_number(value, hint)
    return value if isinstance(value, origin or hint) else MISMATCH


def convert_items(value: Any, arguments: tuple) -> Any:
    if not isinstance(value, list | tuple):
        return MISMATCH
    hints = (arguments[0],) * len(value) if arguments[-1] is Ellipsis else arguments
    items = tuple(convert(item, hint) for item, hint in zip(value, hints, strict=False))
    return MISMATCH if MISMATCH in items or len(hints) != len(value) else items


def convert_number(value: Any, kind: type) -> Any:
    if isinstance(value, bool) or not isinstance(value, Integral if kind is int else Real):
        return MISMATCH
    return kind(value) if math.isfinite(value) else MISMATCH


def describe(hint: Any) -> str:
    words = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "absent"}
    if hint in words:
        return words[hint]
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return " or ".join(f'"{each}"' for each in arguments)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(describe(each) for each in arguments if each is not type(None))
    if origin is tuple:
        return f"a list, each {describe(arguments[0])}"
    return {"Mapping": "a table", "PathLike": "a path", "Iterable": "a list"}.get((origin or hint).__name__, str(hint))


def check_range(config: Any, name: str, low, high=None, open_low: bool = False, open_high: bool = False) -> None:
    """Raises ConfigError unless the number in field ``name`` (None passes) lies between ``low`` and ``high``."""
    value = getattr(config, name)
    if value is None:
        return
    below = value <= low if open_low else value < low
    above = high is not None and (value >= high if open_high else value > high)
    if below or above:
        limits = f"{'more than' if open_low else 'at least'} {low}"
        if high is not None:
            limits += f" and {'less than' if open_high else 'at most'} {high}"
        raise ConfigError(f"{name} is {value}; it must be {limits}")


def check_multiple(config: Any, name: str, unit: int, unit_name: str | None = None) -> None:
    """Raises ConfigError unless the field ``name`` (None passes) is a positive multiple of ``unit``."""
    value = getattr(config, name)
    if value is not None and (value < 1 or value % unit):
        shown = f"{unit_name} = {unit}" if unit_name else unit
        raise ConfigError(f"{name} is {value}; it must be a positive multiple of {shown}")
