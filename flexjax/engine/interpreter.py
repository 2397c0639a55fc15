"""What the engine's thread asks of the interpreter, which it shares with the threads of a server.

Both are settings of the process.
"""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

SWITCH_SECONDS = 1e-4
"""After so long a thread that computes gives way to one that waits for the interpreter. The default is 5 ms, a whole
decode step: beside one busy thread a turn of 3.1 ms took 20 ms, with this 3.5."""


@contextmanager
def prompt_interpreter() -> Iterator[None]:
    """Threads are switched quickly from now on; other engines of the process may count on it, so it stays so. While
    this lasts, nothing that was made before is searched for garbage: most of it is there for good, and a search took
    more than 0.1 s, in which every row waits."""
    sys.setswitchinterval(SWITCH_SECONDS)
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
