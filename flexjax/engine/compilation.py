"""Compiling many programs at once: at start-up, and when layouts or a job join later."""

import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial

import jax

from flexjax.engine.blueprint import Compiled
from flexjax.engine.calibration import use_first
from flexjax.engine.layouts import LayoutCatalog
from flexjax.engine.loop import Loop
from flexjax.engine.programs import JobShape, Programs
from flexjax.layout import SlotLayout
from flexjax.memory import OutOfMemory
from flexjax.request import SamplingLevel, SamplingParams

logger = logging.getLogger(__name__)

COMPILERS = 16
"""Programs compiled at a time, at most; each takes a processor while it is."""

NO_MEMORY = "RESOURCE_EXHAUSTED"
"""What jax's error says when the device has no memory left, whatever else it is about."""

Progress = Callable[[str], None]


def compile_layouts(programs: Programs, layouts: Sequence[SlotLayout], progress: Progress) -> None:
    """Get the forward step of every layout and what samples from it.

    Args:
        progress: called with a line of text as each is there.
    """
    started, total = time.perf_counter(), len(layouts)

    def ready(layout: SlotLayout) -> tuple[SlotLayout, Compiled]:
        programs.sample(layout.rows, SamplingLevel.GREEDY, layout.logprobs)
        return layout, programs.forward(layout)

    with programs.lowering:
        for number, (layout, program) in enumerate(side_by_side([partial(ready, each) for each in layouts]), 1):
            done = "loaded" if program.stored else "compiled"
            progress(f"ready {number} of {total}: {describe(layout)}, {done} in {program.seconds:.1f} s")
    progress(f"{total} programs ready in {time.perf_counter() - started:.1f} s")


def compile_job(programs: Programs, shape: JobShape, optimizer) -> None:
    """Get a job's programs before it meets the engine's thread."""
    usual, own = programs.kernels.grouped_lora_grad, programs.kernels_of(shape).grouped_lora_grad
    if own != usual:
        logger.warning("gradients of rank %d take grouped_lora_grad %s; %s has no room", shape.rank, own, usual)
    wanted = [programs.loss, programs.backward, lambda shape: programs.update(shape, optimizer), programs.publish]
    if programs.dims.lean_tape is not None:
        wanted.append(programs.lean_backward)
    with programs.lowering:
        for _ in side_by_side([partial(program, shape) for program in wanted]):
            pass


def side_by_side[Result](tasks: Iterable[Callable[[], Result]]) -> Iterator[Result]:
    """What tasks that compile return, as they end; raises what one of them raised.

    Ways to compute a product are measured on the device, which takes memory of it. Once its pages are there, what is
    left suffices for one task, but not always for several that measure at once. Those that it did not suffice for are
    done again, one by one.

    Raises:
        OutOfMemory: it does not suffice for one that is alone either.
    """
    again = []
    with ThreadPoolExecutor(min(COMPILERS, os.cpu_count() or 1), thread_name_prefix="flexjax-compiler") as threads:
        running = {threads.submit(task): task for task in tasks}
        for ended in as_completed(running):
            error = ended.exception()
            if error is None:
                yield ended.result()
            elif wants_memory(error):
                again.append(running[ended])
            else:
                raise error
    if again:
        logger.warning("%d programs are compiled one by one; side by side there is not enough memory", len(again))
    for task in again:
        try:
            yield task()
        except jax.errors.JaxRuntimeError as error:
            if wants_memory(error):
                raise OutOfMemory(f"a program needs more memory than the pages leave; lower pages: {error}") from error
            raise


def wants_memory(error: BaseException) -> bool:
    return isinstance(error, jax.errors.JaxRuntimeError) and NO_MEMORY in str(error)


def describe(layout: SlotLayout) -> str:
    flags = [name for name in ("tape", "dropout", "logprobs", "prompt_logprobs", "base_only") if getattr(layout, name)]
    chunk = [f"+ {layout.chunk} chunk slots"] if layout.chunk else []
    return " ".join([f"forward {layout.rows} rows", *chunk, *flags])


class LayoutOffer:
    """Has compiled what a catalog gains while the engine runs, then lets the scheduler use it. Any thread may ask.

    Args:
        catalog: the layouts that it has now are there already.
        loop: of the engine.
    """

    def __init__(self, catalog: LayoutCatalog, programs: Programs, loop: Loop, progress: Progress):
        self.catalog = catalog
        self._programs, self._loop, self._progress = programs, loop, progress
        self._offered, self._lock = set(catalog.layouts), threading.Lock()

    def jobs(self, dropout: bool) -> None:
        """Steps may hold finetuning windows from now on."""
        self.catalog.add_jobs()
        if dropout:
            self.catalog.add_flags(dropout=True)
        self._offer()

    def adapters(self) -> None:
        """Slots may name adapters from now on."""
        self.catalog.add_adapters()
        self._offer()

    def requests(self, sampling: SamplingParams) -> None:
        """Requests may sample so from now on."""
        logprobs = sampling.logprobs is not None or sampling.prompt_logprobs is not None
        self._programs.offer_sampling(self.catalog.row_sizes, sampling.level, logprobs)
        for flag in ("logprobs", "prompt_logprobs"):
            if getattr(sampling, flag) is not None:
                self.catalog.add_flags(logprobs=True, prompt_logprobs=flag == "prompt_logprobs")
                self._offer()

    def _offer(self) -> None:
        with self._lock:
            new = [layout for layout in self.catalog.layouts if layout not in self._offered]
            if new:
                compile_layouts(self._programs, new, self._progress)
                for layout in new:  # whoever comes meanwhile waits for one of them
                    self._loop.call(self._add, layout)
                self._offered.update(new)

    def _add(self, layout: SlotLayout) -> None:
        """On the engine's thread. Beside others the layout is used first when it is needed: most layouts are not soon,
        and for each of them all rows would wait."""
        if self._loop.scheduler.idle:
            use_first(self._loop.runner, layout)
        self._loop.scheduler.add_layouts([layout])
