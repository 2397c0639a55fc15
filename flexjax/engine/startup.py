"""Start-up: from a configuration to a loop that is ready to run. Shows what it does and how long it takes."""

import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp

from flexjax.compiler.rematerialization import all_plans, backward_work, leaner_names, resolve_tape
from flexjax.config import EngineConfig
from flexjax.engine.calibration import calibrate_forward
from flexjax.engine.compilation import compile_layouts
from flexjax.engine.layouts import LayoutCatalog
from flexjax.engine.lowering import processes_for
from flexjax.engine.machine import device_mesh, memory_limit, program_folder
from flexjax.engine.programs import Programs
from flexjax.engine.runner import Runner
from flexjax.fields import ConfigError
from flexjax.layout import PAGE_TOKENS, tiles_for
from flexjax.memory import MemoryPlan, measuring_bytes, plan_memory, with_pages
from flexjax.models.build import abstract_decoder, dtype_of, dummy_weights, place_weights
from flexjax.models.config import ModelConfig
from flexjax.models.lora import MODULES
from flexjax.scheduler import LatencyModel, Policy, policy_from_name
from flexjax.state import KV_COLUMNS, Dimensions, nbytes
from flexjax.steps.kernels import Kernels
from flexjax.weights.source import ModelSource

logger = logging.getLogger(__name__)

def dimensions_of(config: EngineConfig, model: ModelConfig, tape: tuple[str, ...]) -> Dimensions:
    """Every number that decides an array shape, but the pages; ``config`` is resolved. Where it names what tapes keep,
    they keep no less."""
    work = backward_work(model, MODULES, dtype_of(config.dtype), tp=config.tp, mean_context=config.max_model_len // 2)
    return Dimensions(
        model=model,
        dtype=dtype_of(config.dtype),
        max_rows=config.max_rows,
        context=tiles_for(config.max_model_len) * PAGE_TOKENS,
        pages=0,
        rank_capacity=config.adapter_rank_capacity,
        adapters=config.max_adapters + 1,
        microbatch=config.microbatch_tokens,
        window=config.backward_window,
        tape=tape,
        tp=config.tp,
        lean_tape=leaner_names(work, tape) if config.tape == "auto" else None,
    )


def policy_of(config: EngineConfig) -> Policy:
    """The policy of a resolved configuration, with its objectives in seconds."""
    options = config.options
    if config.policy == "co_serve":
        objective = config.tpot_objective_ms or config.itl_objective_ms
        if objective is None:
            raise ConfigError("policy is 'co_serve' without an objective; set tpot_objective_ms or itl_objective_ms")
        given = {"objective": objective, "itl": config.itl_objective_ms, "ttft": config.ttft_objective_ms}
        seconds = {name: value / 1e3 for name, value in given.items() if value is not None}
        options = {**seconds, "margin": config.objective_margin, **options}
    return policy_from_name(config.policy, **options)


def tape_of(config: EngineConfig, model: ModelConfig, weight_bytes: int) -> tuple[str, ...]:
    """Names a tape keeps: the configured ones, or those with which the backward pass recomputes least among those
    that fit the pages which full rows leave, or half of all pages if that is more."""
    lean = dimensions_of(config, model, ("x",))
    plan = plan_pages(config, lean, weight_bytes, temporaries=0)
    pages = config.pages or plan.affordable
    for_tapes = max(pages // 2, pages - config.max_rows * lean.context_pages)
    blocks = lean.microbatch // PAGE_TOKENS
    columns = (for_tapes // config.max_running_jobs - lean.final_pages(blocks)) // blocks - KV_COLUMNS
    work = backward_work(model, MODULES, lean.dtype, tp=config.tp, mean_context=config.max_model_len // 2)
    leanest = all_plans(work)[0].columns
    return resolve_tape(config.tape, work, columns=max(columns, leanest)).names


def plan_pages(config: EngineConfig, dims: Dimensions, weight_bytes: int, temporaries: int) -> MemoryPlan:
    return plan_memory(
        dims,
        weights=weight_bytes,
        temporaries=temporaries,
        limit=memory_limit(config),
        jobs=config.max_running_jobs,
        pages=config.pages,
        measuring=measuring_bytes(dims) if jax.default_backend() == "gpu" else 0,
    )


class Machine:
    """What start-up builds: programs, device state and a calibrated latency model.

    Args:
        config: resolved for the model.
        progress: called with a line of text at each step.
    """

    def __init__(self, config: EngineConfig, source: ModelSource, progress: Callable[[str], None]):
        self.config, self.progress = config, progress
        self.catalog = LayoutCatalog(config, policy_of(config).layout)
        self.layouts = self.catalog.layouts
        mesh = device_mesh(config.tp)
        platform, dtype = mesh.devices.flat[0].platform, dtype_of(config.dtype)
        kernels = Kernels.for_model(platform, source.config, dtype, config.adapter_rank_capacity, config.tp)
        progress(f"kernels on {platform}: {kernels}; all else is XLA's")
        definition, shapes = abstract_decoder(source.config, dtype_of(config.dtype), config.tp)
        weight_bytes = nbytes(shapes) // config.tp
        dims = dimensions_of(config, source.config, tape_of(config, source.config, weight_bytes))
        self.plan = plan_pages(config, dims, weight_bytes, temporaries=0)
        folder, lowering = program_folder(config), processes_for(mesh)
        sized = lambda: Programs(definition, shapes, with_pages(dims, self.plan), kernels, mesh, folder, lowering)
        with lowering, ThreadPoolExecutor(1) as beside:
            programs = sized()
            temporaries = beside.submit(self._temporaries, programs)
            weights = self._weights(programs, source, shapes)
            supposed, self.plan = self.plan, plan_pages(config, dims, weight_bytes, temporaries.result())
            if self.plan.pages != supposed.pages:
                programs = sized()
            compile_layouts(programs, self.layouts, progress)
        self.runner = Runner(programs, weights)
        self.latency = LatencyModel()
        calibrate_forward(self.runner, self.latency, self.layouts)

    def _weights(self, programs: Programs, source: ModelSource, shapes):
        started = time.perf_counter()
        config, dtype = self.config, dtype_of(self.config.dtype)
        if config.load_format == "dummy":
            random = config.tp, config.seed, programs.weight_shardings(), programs.joined
            weights = dummy_weights(source.config, dtype, *random)
        else:
            weights = place_weights(shapes, source.load_weights(dtype, config.tp), programs.place_weight)
        jax.block_until_ready(weights)
        self.progress(f"weights: {nbytes(shapes) / 2**20:,.0f} MiB in {time.perf_counter() - started:.1f} s")
        return weights

    def _temporaries(self, programs: Programs) -> int:
        """Bytes beside the state that the largest forward step takes, its logits with them. They do not depend on the
        number of pages, so the other layouts need not be compiled to know how many there can be."""
        largest = self.catalog.largest
        logits = largest.rows * programs.dims.model.vocab_size * jnp.dtype(jnp.float32).itemsize
        return programs.forward(largest).memory.temp_size_in_bytes + logits
