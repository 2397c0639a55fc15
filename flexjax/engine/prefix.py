"""Prefix: a list as it was, while it grows. It copies nothing, so that a snapshot costs the same after every token."""

from collections.abc import Sequence


class Prefix(Sequence):
    """The first ``length`` items of a list that is only ever appended to. Equal to lists of the same items."""

    __slots__ = ("_items", "_length")

    def __init__(self, items: list, length: int):
        self._items, self._length = items, length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index):
        places = range(self._length)[index]
        return [self._items[place] for place in places] if isinstance(index, slice) else self._items[places]

    def __eq__(self, other) -> bool:
        return list(self) == list(other) if isinstance(other, list | Prefix) else NotImplemented

    def __iter__(self):
        return iter(self._items[: self._length])

    def __repr__(self) -> str:
        return repr(list(self))
