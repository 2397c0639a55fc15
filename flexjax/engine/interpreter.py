"""What the engine's thread asks of the interpreter, which it shares with the threads of a server.

All are settings of the process.
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
    more than 0.1 s, in which every row waits. When one of several engines ends, all is searched again: what is left of
    it could not go otherwise."""
    sys.setswitchinterval(SWITCH_SECONDS)
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def set_aside() -> None:
    """Within `prompt_interpreter`: from now on nothing that is alive is searched for garbage, as what was there at its
    beginning. For seldom moments after which much stays, such as the data and the programs of a job.

    No search goes before it: that would be the pause that it is to save. So what refers to itself and is garbage by now
    or becomes it later, is left behind until an engine ends. That is little: before, what was made since the last
    search, which comes after some ten thousand objects; later, what the requests under way hold of that kind. The
    engine's own jobs and requests do not refer to themselves, and go as soon as they have ended.
    """
    gc.freeze()
