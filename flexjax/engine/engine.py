"""Engine: the public Python API. Serves requests and runs finetuning jobs from one copy of the weights.

Calls may come from any thread; the device belongs to the engine's own (`flexjax.engine.loop`).
"""

import logging
import os
import queue
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

from flexjax.config import EngineConfig, from_table, load_tables
from flexjax.engine.adapter_library import AdapterLibrary, Ready
from flexjax.engine.adapters import AdapterTable
from flexjax.engine.checkpoints import Checkpoints
from flexjax.engine.compilation import LayoutOffer, compile_job
from flexjax.engine.handles import FinetuneHandle
from flexjax.engine.intake import Intake
from flexjax.engine.job import Job, ShowCheckpoint, ShowTrained, optimizer_of, shape_of
from flexjax.engine.loop import Loop
from flexjax.engine.machine import platform_of
from flexjax.engine.startup import Machine, policy_of
from flexjax.engine.submission import Submission
from flexjax.engine.trainer import Trainer
from flexjax.fields import ConfigError
from flexjax.finetuning.job import FinetuneJob
from flexjax.finetuning.job_run import JobRun
from flexjax.request import RequestOutput, SamplingParams
from flexjax.scheduler import Scheduler
from flexjax.weights.adapter import LoraAdapter, fresh_adapter
from flexjax.weights.peft import read_adapter
from flexjax.weights.source import open_model

logger = logging.getLogger(__name__)

Prompt = str | list[int]


class Engine:
    """A model on the device, with its adapters, requests and finetuning jobs. Also a context manager.

    Args:
        progress: called with a line of text at each step of start-up, and when programs are compiled later, from
            whichever thread needs them; None logs them.

    Raises:
        ConfigError, FileNotFoundError, ValueError: the configuration or the model cannot be used.
    """

    def __init__(self, config: EngineConfig, progress=None):
        source = open_model(config.model, config.revision)
        self.model = source.config
        self.config = config.resolved(source.config.max_position_embeddings, platform_of(config))
        self.tokenizer = source.load_tokenizer() if source.has_tokenizer else None
        self.defaults = source.read_defaults(self.tokenizer)
        progress = progress or logger.info
        machine = Machine(self.config, source, progress)
        self.memory_plan, self._runner = machine.plan, machine.runner
        self.scheduler = Scheduler(
            machine.layouts,
            pages=machine.plan.pages,
            max_rows=self.config.max_rows,
            max_model_len=self.config.max_model_len,
            latency=machine.latency,
            policy=policy_of(self.config),
            prefix_caching=self.config.prefix_caching,
        )
        self.library = AdapterLibrary(self._runner, self.model, self.config, self.scheduler.forget_adapter)
        self.checkpoints, tier = Checkpoints(self.config.checkpoint_dir), self.library.tier
        jobs, announce = self.config.max_running_jobs, self.library.announce
        self.trainer = Trainer(self._runner, self.scheduler, tier, jobs, self.checkpoints, announce)
        self.loop = Loop(self.scheduler, self._runner, self.trainer, tier)
        self._layouts = LayoutOffer(machine.catalog, self._runner.programs, self.loop, progress)
        stops = self.defaults.stop_token_ids
        self._intake = Intake(self.config, stops, self.tokenizer, self.loop, self.library, self._layouts)
        self.library.open(self.loop)
        self.loop.start()

    @classmethod
    def from_config(cls, config: str | os.PathLike | EngineConfig, progress=None) -> "Engine":
        """An engine from an `EngineConfig`, or from the [engine] table of a TOML file."""
        if isinstance(config, EngineConfig):
            return cls(config, progress)
        path = Path(config)
        table = load_tables(path).get("engine", {})
        return cls(from_table(EngineConfig, table, f"{path} [engine]", path.parent), progress)

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Stop the engine; requests that are not done end with finish reason "abort"; jobs that are not done are
        cancelled, after a checkpoint if there is a ``checkpoint_dir``."""
        self.loop.stop()
        self.library.tier.close()

    def set_objective(self, tpot_ms: float) -> None:
        """Aim at another time per output token, in milliseconds, from the next iteration on.

        Raises:
            ConfigError: the value is not above 0, or the policy has no such objective.
        """
        if not tpot_ms > 0 or not hasattr(self.scheduler.policy, "objective"):
            raise ConfigError(
                f"tpot_ms is {tpot_ms} and the policy {self.config.policy!r}; an objective is above 0 milliseconds and "
                "belongs to co_serve"
            )
        self.loop.call(setattr, self.scheduler.policy, "objective", tpot_ms / 1e3)

    def set_policy(self, policy: str, options: Mapping[str, Any] | None = None) -> None:
        """Share iterations by another policy from the next one on, with the objectives of the configuration.

        Args:
            options: of the policy, as ``policy_options`` of `EngineConfig`.

        Raises:
            ConfigError, ValueError: no such policy or option, or it lacks one; or it, or the policy before it, keeps to
                one layout, which an engine is started with.
        """
        config = replace(self.config, policy=policy, policy_options=options or {})
        chosen = policy_of(config)
        if bound := [each for each in (self.scheduler.policy, chosen) if each.layout is not None]:
            raise ConfigError(
                f"policy is {policy!r} after {self.config.policy!r}, and one of them keeps to {bound[0].layout}; start "
                "an engine with it"
            )
        self.loop.call(setattr, self.scheduler, "policy", chosen)
        self.config = config

    # requests

    def generate(
        self, prompts: list[Prompt], sampling: SamplingParams | None = None, adapter: str | None = None
    ) -> list[RequestOutput]:
        """Continue prompts (text or token ids); with n > 1 the outputs of a prompt are adjacent.

        Raises:
            UnknownAdapter: no adapter of that name is loaded.
            ValueError: a prompt is empty or too long, or holds a token id the model does not have.
        """
        if isinstance(prompts, str):
            raise TypeError("prompts is a string; give a list of prompts")
        encoded = [self.encode(prompt) for prompt in prompts]
        return self._run_all(encoded, sampling, adapter)

    def chat(
        self, conversations: list[list[dict]], sampling: SamplingParams | None = None, adapter: str | None = None
    ) -> list[RequestOutput]:
        """Answer conversations, each a list of {"role", "content"} messages, through the model's chat template."""
        encoded = [self._tokenizer().apply_chat_template(messages) for messages in conversations]
        return self._run_all(encoded, sampling, adapter)

    def stream(
        self, prompt: Prompt, sampling: SamplingParams | None = None, adapter: str | None = None, priority: int = 0
    ) -> Iterator[RequestOutput]:
        """Outputs as they grow, each a snapshot; the last of each index has a finish reason. Closing the iterator
        cancels the request."""
        listener: queue.SimpleQueue[RequestOutput] = queue.SimpleQueue()
        requests = self.submit(self.encode(prompt), sampling, adapter, listener, priority)
        return self._listen(requests, listener)

    def _listen(self, requests: list[int], listener: queue.SimpleQueue) -> Iterator[RequestOutput]:
        ended = 0
        try:
            while ended < len(requests):
                output = listener.get()
                ended += output.finish_reason is not None
                yield replace(output, token_ids=list(output.token_ids))
        finally:
            if ended < len(requests):
                self.cancel(requests)

    def submit(
        self,
        prompt: list[int],
        sampling: SamplingParams | None,
        adapter: str | None,
        listener: queue.SimpleQueue,
        priority: int = 0,
    ) -> list[int]:
        """Queue a prompt; ``listener`` receives a snapshot after every token. Returns the ids of its n requests."""
        (ids,) = self.submit_all([Submission(prompt, sampling, adapter, listener, priority)])
        return ids

    def submit_all(self, submissions: Sequence[Submission]) -> list[list[int]]:
        """Queue several prompts between the same two iterations, so that the first step can take as many as fit.

        Returns the ids of each submission's requests. If one is refused, none is queued.
        """
        return self.submit_soon(submissions).result()

    def submit_soon(self, submissions: Sequence[Submission]) -> Future:
        """As `submit_all`, without waiting for the engine's thread: the ids, or why it refused, are in the future,
        which must not be cancelled."""
        settled = [each._replace(sampling=each.sampling or self.sampling_defaults()) for each in submissions]
        return self._intake.submit(settled)

    def cancel(self, request_ids: list[int]) -> None:
        """End requests at once, with finish reason "abort"; those that have ended are left as they are."""
        self.cancel_soon(request_ids).result()

    def cancel_soon(self, request_ids: list[int]) -> Future:
        """As `cancel`, without waiting for the engine's thread."""
        return self.loop.post(lambda: [self.loop.cancel_request(each) for each in request_ids])

    def sampling_defaults(self) -> SamplingParams:
        """What the model's makers recommend, in vLLM's defaults for the rest."""
        return SamplingParams(**self.defaults.sampling)

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt, checked against the vocabulary."""
        ids = self._tokenizer().encode(prompt) if isinstance(prompt, str) else list(prompt)
        wrong = next((i for i in ids if not 0 <= i < self.model.vocab_size), None)
        if wrong is not None:
            raise ValueError(f"the prompt holds token id {wrong}; the model's ids are 0 to {self.model.vocab_size - 1}")
        return ids

    def _run_all(self, prompts: list[list[int]], sampling: SamplingParams | None, adapter) -> list[RequestOutput]:
        """Submit all and wait for all; they are cancelled if the wait ends early."""
        listeners = [queue.SimpleQueue() for _ in prompts]
        pairs = zip(prompts, listeners, strict=True)
        ids = self.submit_all([Submission(prompt, sampling, adapter, listener) for prompt, listener in pairs])
        try:
            pairs = zip(ids, listeners, strict=True)
            return [output for each, listener in pairs for output in self._collect(each, listener)]
        except BaseException:
            self.cancel([each for group in ids for each in group])
            raise

    def _collect(self, ids: list[int], listener: queue.SimpleQueue) -> list[RequestOutput]:
        final = [each for each in self._listen(ids, listener) if each.finish_reason is not None]
        return sorted(final, key=lambda output: output.index)

    def _tokenizer(self):
        if self.tokenizer is None:
            raise ValueError(f"model {self.config.model} has no tokenizer.json; give token ids instead of text")
        return self.tokenizer

    # adapters

    @property
    def adapters(self) -> AdapterTable:
        """Which versions there are; it belongs to the engine's thread."""
        return self.library.table

    def load_adapter(self, name: str, directory: str | os.PathLike) -> None:
        """Load a PEFT adapter under a name. A name in use gets a new version; requests that run or wait keep theirs.

        There may be more adapters than `max_adapters`: those that are not on the device come there when they are asked
        for, in the place of the one that was used least recently.

        Raises:
            FileNotFoundError, ValueError: the adapter cannot be read, does not fit the model, or is larger than the
                places of all adapters together.
        """
        self.library.add(name, self.prepare_adapter(name, directory))

    def prepare_adapter(self, name: str, directory: str | os.PathLike) -> Ready:
        """All of `load_adapter` that takes long or fails; ``library.add`` does the rest. Raises as it does."""
        self._layouts.adapters()
        return self.library.prepare(name, directory)

    def register_adapter(self, name: str, directory: str | os.PathLike, fingerprint: str | None = None) -> None:
        """As `load_adapter`, but only the configuration is read now, and the weights when somebody asks for them. The
        folder must not change any more: a request that finds others in it is ended with an error.

        Args:
            fingerprint: of the adapter that it must be (`LoraAdapter.fingerprint`); None takes what is found first.
        """
        self._layouts.adapters()
        self.library.register(name, directory, fingerprint)

    def unload_adapter(self, name: str) -> None:
        """Take an adapter's name away; requests that use it go on. Raises UnknownAdapter."""
        self.library.unload(name)

    def export_adapter(self, name: str, directory: str | os.PathLike) -> None:
        """Write an adapter in PEFT's format. From then on it may leave the host's memory. Raises UnknownAdapter."""
        self.library.export(name, directory)

    def adapter(self, name: str) -> LoraAdapter:
        """The newest version of an adapter, on the host. Raises UnknownAdapter."""
        return self.library.get(name)

    # finetuning

    def finetune(
        self,
        job: FinetuneJob,
        resume: bool = False,
        paused: bool = False,
        show_checkpoint: ShowCheckpoint | None = None,
        show_trained: ShowTrained | None = None,
    ) -> FinetuneHandle:
        """Queue a finetuning job; when it succeeds its adapter serves under the job's name at once.

        Args:
            resume: go on from the newest whole checkpoint under ``checkpoint_dir``, if there is one.
            paused: wait for `FinetuneHandle.resume` before the first unit.
            show_checkpoint: called on another thread with the step, the adapter and the events of each checkpoint,
                before it is there to resume from; if it raises OSError or ValueError there is no checkpoint.
            show_trained: called on the engine's thread with the trained adapter before its name means it; it must not
                take long. From then on the name may be anybody's to unload.

        Raises:
            ConfigError: the data or the settings cannot be used; rows are named by their line.
            NoRoomForAdapter: the adapter is too large for the device or the host's memory.
        """
        if self.config.max_model_len < self.config.microbatch_tokens and job.max_length is None:
            job = replace(job, max_length=self.config.max_model_len)
        run = JobRun.prepare(
            job,
            self.tokenizer,
            vocab_size=self.model.vocab_size,
            max_model_len=self.config.max_model_len,
            microbatch_tokens=self.config.microbatch_tokens,
        )
        adapter = self._starting_adapter(job)
        self.adapters.require_size(job.name, adapter.rank)
        self.library.host.require_room(adapter.nbytes)
        shape = shape_of(job, adapter)
        self._layouts.jobs(shape.dropout)
        checkpoint = self.checkpoints.find(run, resume)
        compile_job(self._runner.programs, shape, optimizer_of(run))
        if paused:
            run.pause()
        self.loop.call(self.trainer.submit, Job(run, adapter, checkpoint, show_checkpoint, show_trained))
        return FinetuneHandle(run, self.loop, self.trainer, 0 if checkpoint is None else checkpoint.step)

    def _starting_adapter(self, job: FinetuneJob) -> LoraAdapter:
        if job.init_adapter is None:
            return fresh_adapter(
                self.model,
                rank=job.rank,
                alpha=job.alpha,
                use_rslora=job.use_rslora,
                dropout=job.dropout,
                target_modules=job.target_modules,
                base_model_name=self.config.served_model_name,
                seed=job.seed,
            )
        if str(job.init_adapter) in self.adapters.named:
            return self.adapter(str(job.init_adapter))
        return read_adapter(job.init_adapter, self.model)
