"""Trainer: finetuning jobs between their data, the scheduler and the device. Runs on the engine's thread.

A job's life here: prepared (data read) → admitted (its master on the device) → begun, once its private adapter version
has a place → its microbatches offered to the scheduler one after another → results recorded → finished (the version is
announced under the job's name, or given up).
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

from flexjax.engine.adapter_tier import AdapterTier, User
from flexjax.engine.adapters import AdapterVersion, NoRoomForAdapter
from flexjax.engine.batch import Training
from flexjax.engine.calibration import calibrate_job
from flexjax.engine.checkpoints import Checkpoints
from flexjax.engine.interpreter import set_aside
from flexjax.engine.job import Job, lowest_adapted_layer, optimizer_of, padded_factors, shape_of, without_padding
from flexjax.engine.metrics import History, SettledMicrobatch
from flexjax.engine.programs import JobShape
from flexjax.engine.runner import InFlight, Runner
from flexjax.finetuning.job import JobStatus
from flexjax.finetuning.job_queue import JobQueue
from flexjax.finetuning.packing import PackedMicrobatch
from flexjax.scheduler.cursor import Microbatch
from flexjax.scheduler.output import Iteration, UnitKind
from flexjax.scheduler.scheduler import Scheduler
from flexjax.state import KV_COLUMNS, Master
from flexjax.steps.update import OptimizerSpec, new_master
from flexjax.weights.adapter import LoraAdapter
from flexjax.weights.checkpoint import CheckpointError

logger = logging.getLogger(__name__)

KEPT_MICROBATCHES = 100_000


class Trainer:
    """Owns the job queue.

    Args:
        announce: called with (version, trained adapter) when a job succeeds; makes the version serve.

    Attributes:
        jobs: all that there were, by name; of those that have ended, without what is large.
        settled: training microbatches whose backward pass has ended, the newest last; only ever appended to.
    """

    def __init__(
        self,
        runner: Runner,
        scheduler: Scheduler,
        tier: AdapterTier,
        max_running: int,
        checkpoints: Checkpoints,
        announce: Callable[[AdapterVersion, LoraAdapter], None],
    ):
        self.runner, self.scheduler, self.tier, self.announce = runner, scheduler, tier, announce
        self.queue, self.checkpoints = JobQueue(max_running), checkpoints
        self.jobs: dict[str, Job] = {}
        self._unended: list[Job] = []
        self.training: dict[int, Training] = {}
        self.settled = History(SettledMicrobatch, KEPT_MICROBATCHES)
        self._next_id = 0

    def submit(self, job: Job) -> None:
        """Queue a job. Its data and its programs are not searched for garbage from now on. Raises ConfigError if one of
        its name has not ended."""
        self._forget_ended()
        self.queue.submit(job.run)
        self.jobs[job.name] = job
        self._unended.append(job)
        set_aside()

    def offer(self) -> None:
        """Start queued jobs, and hand the scheduler the next microbatch of every job that wants one."""
        for run in self.queue.admit():
            job = self.jobs[run.job.name]
            with self._faults_of(job):
                self._start(job)
        for job in self._wanting():
            with self._faults_of(job):
                packed = job.run.peek(len(job.current))
                if self._ready(job, packed):
                    self._offer_microbatch(job, packed)

    @contextmanager
    def _faults_of(self, job: Job) -> Iterator[None]:
        """Whatever goes wrong inside ends this job, and no other and no request."""
        try:
            yield
        except Exception as error:
            logger.exception("a fault ends the job %s", job.name)
            if not job.run.status.final:
                job.run.fail(f"{type(error).__name__}: {error}")
            self._finish_if_done(job)

    def _wanting(self) -> list[Job]:
        """Running jobs with data left that could have another microbatch on its way."""
        begun = [run for run in self.queue.running() if run.job.name in self.runner.jobs]
        running = [self.jobs[run.job.name] for run in begun if not run.exhausted]
        return [job for job in running if self.scheduler.wants_microbatch(job.name)]

    def _ready(self, job: Job, packed: PackedMicrobatch) -> bool:
        """An evaluation reads the losses of its own group only, so it waits for the results before it; a checkpoint
        holds what belongs to one update, so the next group waits for it."""
        return packed.index > 0 or not (packed.evaluation or job.due) or (job.run.settled and not job.due)

    def _start(self, job: Job) -> None:
        spec, shape = optimizer_of(job.run), shape_of(job.run.job, job.adapter)
        master = new_master(spec, self.runner.programs.place_factors(padded_factors(job.adapter, shape.rank), shape))
        try:
            if job.checkpoint is not None:
                master = self.checkpoints.restore(job.checkpoint, master)
            job.version = self.tier.table.new(job.name, shape.rank, job.adapter.scale)
        except (NoRoomForAdapter, CheckpointError) as error:
            job.run.fail(str(error))
            return
        begin = lambda: self._begin(job, shape, spec, master)
        user = User((0, self.runner.clock(), 0), begin, lambda error: job.run.fail(str(error)))
        self.tier.want(job.version, job.name, user)

    def _begin(self, job: Job, shape: JobShape, spec: OptimizerSpec, master: Master) -> None:
        """Its version has a place, which it keeps until the job ends."""
        with self._faults_of(job):
            try:
                self.runner.add_job(job.name, shape, spec, job.version, master, job.adapter.ratios)
            except BaseException:
                self.tier.table.discard(job.version)
                self.tier.release(job.version)
                raise
            self.scheduler.set_job(job.name, job.run.job.weight, paused=job.run.status is JobStatus.PAUSED)
            calibrate_job(self.runner, self.scheduler.latency, job.name)
            self._finish_if_done(job)  # its last checkpoint may have been of its last step

    def _offer_microbatch(self, job: Job, packed: PackedMicrobatch) -> None:
        choices = self._choices(job, packed)
        try:
            microbatch = next((each for each in choices if self.scheduler.try_add_microbatch(each)), None)
        except ValueError as error:  # it could never run
            job.run.fail(str(error), step=packed.step + 1, lines=packed.lines)
            self._finish_if_done(job)
            return
        if microbatch is None:
            return
        job.current.append(microbatch)
        job.packed[microbatch.id] = packed
        self.training[microbatch.id] = Training(
            packed,
            self.scheduler.microbatch_pages(microbatch.id),
            self.tier.table.pin(self.runner.jobs[job.name].version),
            dropout=0.0 if packed.evaluation else job.run.job.dropout,
            seed=hash((job.run.job.seed, packed.step, packed.index)) & 0xFFFFFFFF,
            lean=microbatch.lean,
        )

    def _choices(self, job: Job, packed: PackedMicrobatch) -> list[Microbatch]:
        """As rich a tape as there are pages for: a lean one only if a job with nothing on its way would have to wait
        for the other, or would wait for ever."""
        dims, rich = self.runner.programs.dims, self._microbatch(job, packed, lean=False)
        if packed.evaluation or dims.lean_tape is None:
            return [rich]
        fits = rich.pages <= dims.pages
        if fits and job.packed:
            return [rich]
        return [rich] * fits + [self._microbatch(job, packed, lean=True)]

    def _microbatch(self, job: Job, packed: PackedMicrobatch, lean: bool) -> Microbatch:
        dims, device_job = self.runner.programs.dims, self.runner.jobs[job.name]
        self._next_id += 1
        columns = (dims.lean if lean else dims).pages_per_block
        return Microbatch(
            id=self._next_id,
            job=job.name,
            lengths=packed.lengths,
            window=dims.window,
            layers=dims.model.num_layers,
            lowest_layer=0 if packed.evaluation else lowest_adapted_layer(job.adapter),
            pages_per_block=KV_COLUMNS if packed.evaluation else columns,
            closes_group=packed.closes_group,
            finals_per_page=dims.finals_per_page,
            evaluation=packed.evaluation,
            adapter_version=device_job.version.version,
            dropout=device_job.shape.dropout and not packed.evaluation,
            lean=lean,
        )

    def learning_rates(self, iteration: Iteration) -> dict[str, float]:
        """Rate of each update in the iteration."""
        jobs = {unit.job for unit in iteration.units if unit.kind is UnitKind.UPDATE}
        return {name: self.jobs[name].run.learning_rate(self.jobs[name].steps) for name in jobs}

    def scheduled(self, iteration: Iteration) -> None:
        """A tape that was dropped begins again, in other pages."""
        for segment in iteration.windows:
            if segment.block == 0:
                pages = self.scheduler.microbatch_pages(segment.microbatch)
                self.training[segment.microbatch] = replace(self.training[segment.microbatch], pages=pages)

    def dispatched(self, iteration: Iteration) -> None:
        """The iteration is on the device: a job whose microbatch has its last unit in it moves on."""
        for unit in iteration.units:
            job = self.jobs[unit.job]
            job.steps += unit.kind is UnitKind.UPDATE
            if job.current and unit == job.current[0].last_unit:
                del job.current[0]
                job.run.advance()

    def failed(self, flight: InFlight) -> None:
        """A unit that could not be dispatched, or that failed on the device, ends its job."""
        for unit, error in flight.faults:
            job = self.jobs[unit.job]
            if unit.microbatch in job.packed:  # else it has ended already
                with self._faults_of(job):
                    raise error

    def completed(self, flight: InFlight) -> None:
        """Read the iteration's results; record steps; finish jobs that are done."""
        self.failed(flight)
        for unit, loss in flight.losses:
            job = self.jobs[unit.job]
            if unit.microbatch in job.packed:  # else it has ended, and another may have its name
                with self._faults_of(job):
                    job.losses[unit.microbatch, unit.window] = float(loss)
        for name, norm in flight.norms.items():
            if name in self.runner.jobs:
                with self._faults_of(self.jobs[name]):
                    self.jobs[name].norm = float(norm)
        for identifier in flight.completion.microbatches:
            self._settle(identifier, flight.iteration.index)
        for job in self._unended:
            with self._faults_of(job):
                if job.due and job.run.settled:
                    self.save(job)
                self._finish_if_done(job)
        self._forget_ended()

    def _forget_ended(self) -> None:
        """What was reported of a job stays; its data and where it began do not."""
        for job in [job for job in self._unended if job.run.status.final and not job.packed]:
            self._unended.remove(job)
            job.run.release_data()
            job.adapter = None
            self.scheduler.cancel_job(job.name)

    def save(self, job: Job) -> None:
        """Checkpoint a job whose results are all recorded."""
        if job.name in self.runner.jobs:
            self.checkpoints.save(job.run, self.runner.jobs[job.name].master, job.show)
            job.saved = job.steps

    def _settle(self, identifier: int, iteration: int) -> None:
        """A microbatch is done: give back its pin; if it closed a group, record the group's result."""
        training = self.training.pop(identifier, None)
        if training is None:
            return  # its job was cancelled after the scheduler reported it
        self.tier.table.unpin(training.adapter)
        job = next(job for job in self._unended if identifier in job.packed)
        with self._faults_of(job):
            self._record(job, job.packed.pop(identifier), iteration, training.lean)

    def _record(self, job: Job, packed: PackedMicrobatch, iteration: int, lean: bool) -> None:
        if not packed.evaluation:
            trained = sum(each.trained_tokens for each in packed.examples)
            self.settled.append(SettledMicrobatch(job.name, iteration, packed.tokens, trained, lean))
        if not packed.closes_group or job.run.status.final:
            return
        loss = sum(job.losses.values())
        job.losses.clear()
        if packed.evaluation:
            job.run.record_evaluation(loss)
        else:
            job.run.record_step(loss, job.norm)

    def _finish_if_done(self, job: Job) -> None:
        run = job.run
        if run.status.final and job.version is not None and self.tier.give_up(job.version, job.name):
            self.tier.table.discard(job.version)  # it ended before it had a place
        if job.name not in self.runner.jobs:
            return
        if run.status.final:
            self._stop(job)
            self.tier.table.discard(job.version)
            self.runner.drop_job(job.name)
            self.tier.release(job.version)
        elif run.status is JobStatus.RUNNING and run.exhausted and run.settled and not job.packed:
            if job.saved != job.steps:
                self.save(job)
            trained = self.trained_adapter(job)
            if job.show_trained is not None:
                job.show_trained(trained)
            self.runner.drop_job(job.name)
            self.announce(job.version, trained)
            self.tier.release(job.version)
            run.succeed()

    def trained_adapter(self, job: Job) -> LoraAdapter:
        """The job's master as it is now, on the host."""
        master = self.runner.jobs[job.name].master
        return without_padding(job.adapter, master.a, master.b)

    @property
    def wants_turn(self) -> bool:
        """Some job could be started, or has a microbatch to offer."""
        return bool(self._wanting()) or self.queue.can_admit

    def abandon(self, failure: BaseException | None) -> None:
        """The engine stops: jobs that have not ended cannot go on. Unless it failed, they leave a checkpoint."""
        for job in self.jobs.values():
            if not job.run.status.final:
                if failure is None and job.run.settled:
                    self.save(job)
                job.run.fail(f"the engine stopped: {failure}") if failure is not None else job.run.cancel()
        self.checkpoints.close()

    def cancel(self, name: str) -> None:
        self.jobs[name].run.cancel()
        self._finish_if_done(self.jobs[name])

    def pause(self, name: str) -> None:
        self.jobs[name].run.pause()
        self.scheduler.set_job(name, self.jobs[name].run.job.weight, paused=True)

    def resume(self, name: str) -> None:
        self.jobs[name].run.resume()
        self.scheduler.set_job(name, self.jobs[name].run.job.weight, paused=False)
        self._finish_if_done(self.jobs[name])  # its last results may have come while it was paused

    def _stop(self, job: Job) -> None:
        """Give up what a job has on its way."""
        self.scheduler.cancel_job(job.name)
        for identifier in job.packed:
            self.tier.table.unpin(self.training.pop(identifier).adapter)
        job.packed.clear()
        job.current.clear()
