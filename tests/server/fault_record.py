"""How often the fault tests try, and what they write down of it for docs/reliability.md."""

import json
import os
from pathlib import Path

TRIES = int(os.environ.get("FLEXJAX_FAULT_TRIES", "1"))
"""`make test` tries once what `make test-faults` tries many times, each time with another seed."""

RESULTS = os.environ.get("FLEXJAX_FAULT_RESULTS")


def note(fault: str, **figures: float | str) -> None:
    """Add a try to the file of results, if there is to be one."""
    if RESULTS is None:
        return
    file = Path(RESULTS)
    results = json.loads(file.read_text()) if file.exists() else {}
    results.setdefault(fault, []).append(figures)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
