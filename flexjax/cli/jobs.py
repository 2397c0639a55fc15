"""CommandJobs: the finetuning jobs of a command, from their tables in CONFIG to adapters on disk."""

import argparse
import shlex
import shutil
import time
from pathlib import Path

import flexjax
from flexjax.cli.progress import JobProgress, show
from flexjax.cli.settings import Settings
from flexjax.finetuning.job import FinetuneJob

OUTPUT = Path("runs/adapters")
POLL_SECONDS = 0.1
CHECKPOINTS = ".checkpoints"
"""Folder under the output directory for checkpoints, where CONFIG names none."""


def add_job_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--output", type=Path, default=OUTPUT, metavar="DIR", help=f"adapters go to DIR/NAME ({OUTPUT})"
    )
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoints, where there are any")


def job_settings(settings: Settings, output: Path) -> Settings:
    """Settings under which interrupted jobs can be resumed."""
    return settings.with_checkpoints(output / CHECKPOINTS) if settings.jobs else settings


def resume_command(command_line: list[str]) -> str:
    """What to type to go on."""
    return shlex.join(command_line if "--resume" in command_line else [*command_line, "--resume"])


def forget_checkpoints(settings: Settings, output: Path) -> None:
    """Remove the checkpoints of jobs that all succeeded, if they are where the user did not ask for them."""
    if settings.engine.checkpoint_dir == str(output / CHECKPOINTS):
        for job in settings.jobs:
            shutil.rmtree(output / CHECKPOINTS / job.name, ignore_errors=True)
        if not any((output / CHECKPOINTS).iterdir()):
            (output / CHECKPOINTS).rmdir()


class CommandJobs:
    """Args:
    output: a job's adapter is written to the folder of its name there.
    """

    def __init__(self, engine: "flexjax.Engine", output: Path):
        self._engine, self._output = engine, output
        self._running = []

    def submit(self, jobs: tuple[FinetuneJob, ...], resume: bool) -> None:
        """Raises ConfigError for the first job that cannot run."""
        for job in jobs:
            began = time.time()
            handle = self._engine.finetune(job, resume=resume)
            self._running.append((handle, JobProgress(job.name, handle.total_steps, began)))

    def follow(self) -> bool:
        """Show the jobs' progress until all have ended, and write the adapter of each that succeeds.

        Returns:
            Whether all have succeeded and their adapters are written.
        """
        succeeded = True
        while self._running:
            time.sleep(POLL_SECONDS)
            for handle, progress in list(self._running):
                status = handle.status
                for line in progress.new_lines(handle.events()):
                    show(line)
                if status in ("succeeded", "failed", "cancelled"):
                    self._running.remove((handle, progress))
                    succeeded &= self._end(handle, status)
        return succeeded

    def _end(self, handle, status: str) -> bool:
        if status == "succeeded":
            return self._write_adapter(handle.name)
        if status == "failed":
            show(f"error: {handle.error}")
        return False

    def _write_adapter(self, name: str) -> bool:
        """The other jobs go on if this fails."""
        directory = self._output / name
        try:
            self._engine.export_adapter(name, directory)
        except OSError as error:
            show(f"error: the adapter {name!r} cannot be written to {directory}: {error}")
            return False
        show(f"{name}: adapter written to {directory}")
        return True
