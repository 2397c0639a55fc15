"""check_names: arrays that a file should hold against those it does, every difference in one message."""

Shapes = dict[str, tuple[int, ...]]


def check_names(title: str, expected: Shapes, found: Shapes) -> None:
    """Compares names and shapes.

    Raises:
        ValueError: ``title``, then every array that is missing, unexpected or of another shape, one a line.
    """
    faults = [f"missing {name} {list(expected[name])}" for name in expected if name not in found]
    faults += [f"unexpected {name} {list(found[name])}" for name in found if name not in expected]
    faults += [
        f"{name} has shape {list(found[name])}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    if faults:
        count = "1 fault" if len(faults) == 1 else f"{len(faults)} faults"
        raise ValueError(f"{title} ({count}):\n  " + "\n  ".join(faults))
