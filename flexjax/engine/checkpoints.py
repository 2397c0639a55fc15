"""Checkpoints of finetuning jobs: what is kept of one, where, and when it is written (in the background)."""

import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np

from flexjax.fields import ConfigError
from flexjax.finetuning.job_run import JobRun
from flexjax.state import Master
from flexjax.weights.checkpoint import CheckpointInfo, latest_checkpoint, restore_arrays, save_checkpoint

logger = logging.getLogger(__name__)


class Checkpoints:
    """Args:
    directory: one folder a job in it; None keeps no checkpoints.
    """

    def __init__(self, directory: str | None):
        self.directory = None if directory is None else Path(directory)
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="flexjax-checkpoints")

    def find(self, run: JobRun, resume: bool) -> CheckpointInfo | None:
        """The checkpoint that a job goes on from; its progress is loaded into ``run``.

        Raises:
            ConfigError: checkpoints exist and the job is not to resume, or there is no checkpoint directory to resume
                from, or the job's settings are not those it began with.
        """
        if self.directory is None:
            if resume:
                raise ConfigError("checkpoint_dir is not set, so there is nothing to resume from; set it in [engine]")
            return None
        folder = self.directory / run.job.name
        info = latest_checkpoint(folder)
        if info is not None and not resume:
            raise ConfigError(
                f"{folder} holds checkpoints of a job named {run.job.name!r} (up to step {info.step}); resume it, move "
                "them away, or choose another name or checkpoint_dir"
            )
        if info is not None:
            run.load_state_dict(info.metadata)
        return info

    def restore(self, info: CheckpointInfo, like: Master) -> Master:
        """The master and optimizer state of a checkpoint, placed as ``like`` is."""
        return Master(**restore_arrays(info, as_tree(like)))

    def save(self, run: JobRun, master: Master, show: Callable[[int, dict, dict], None] | None = None) -> Future | None:
        """Write a job's state after its last update. The arrays are copied before this returns.

        Args:
            show: called on the writer's thread with (step, arrays, state) before the checkpoint is there to resume
                from; if it raises OSError or ValueError there is no checkpoint.
        """
        if self.directory is None:
            return None
        arrays = jax.tree.map(lambda x: np.array(x, copy=True), as_tree(master))
        step, state, folder = len(run.losses), run.state_dict(), self.directory / run.job.name
        return self._writer.submit(self._write, run, folder, step, arrays, state, show)

    def written(self) -> Future:
        """Is done once everything that is to be written now has been."""
        try:
            return self._writer.submit(lambda: None)
        except RuntimeError:  # closed, which waited for it
            done: Future = Future()
            done.set_result(None)
            return done

    def close(self) -> None:
        """Wait for what is being written."""
        self._writer.shutdown(wait=True)

    def _write(self, run: JobRun, folder: Path, step: int, arrays: dict, state: dict, show: Callable | None) -> None:
        try:
            if show is not None:
                show(step, arrays, state)
            run.record_checkpoint(str(save_checkpoint(folder, step, arrays, state)), step)
        except (OSError, ValueError) as error:  # the job goes on; the checkpoint before this one is still there
            logger.error("job %s: %s", run.job.name, error)
            run.record_checkpoint_failure(str(error), step)


def as_tree(master: Master) -> dict:
    return {"a": master.a, "b": master.b, "optimizer": master.optimizer}
