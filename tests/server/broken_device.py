"""``python -m tests.server.broken_device ...`` is ``flexjax ...`` on a device that fails in an update of adapters, with
the weights that were lent to it."""

import itertools
import sys

from flexjax.cli.entry import main
from flexjax.engine.runner import Runner
from tests.engine.broken_program import fail_on_the_device

UPDATES = 70
"""That go well before."""

STACK = 2
"""Which of the program's arguments it is."""


def break_update() -> None:
    update, counter = Runner.update, itertools.count()

    def broken(runner, *arguments):
        if next(counter) == UPDATES:
            runner.programs.update = lambda *_: fail_on_the_device(STACK)
        return update(runner, *arguments)

    Runner.update = broken


if __name__ == "__main__":
    break_update()
    sys.exit(main())
