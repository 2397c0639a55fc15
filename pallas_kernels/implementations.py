"""The choice of an implementation by name. Nothing is chosen for the caller: an unknown name is an error."""

from collections.abc import Callable, Mapping


def choose(operation: str, implementations: Mapping[str, Callable], name: str) -> Callable:
    """The implementation called ``name``.

    Raises:
        ValueError: ``operation`` has no implementation of that name; the message lists those it has.
    """
    if name not in implementations:
        raise ValueError(f"{operation}: no implementation {name!r}; it has {', '.join(sorted(implementations))}")
    return implementations[name]
