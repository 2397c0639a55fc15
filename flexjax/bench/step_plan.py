"""StepPlan: what `flexjax bench step` measures, how long, and with which engines. It measures nothing."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from itertools import batched
from pathlib import Path
from typing import Any

from flexjax.config import from_table, load_tables, resolve_path
from flexjax.fields import ConfigError, check_range, check_types
from flexjax.finetuning.job import TARGET_MODULES
from flexjax.state import TAPE_NAMES

SERVING = {"policy": "inference_only"}
"""Without a job nothing keeps a tape, and programs that could need not be compiled."""

DECODE = SERVING | {"max_model_len": 2048, "chunk_sizes": (4096,)}

ENGINES: dict[str, dict[str, Any]] = {
    "decode": DECODE,
    "decode_lora8": DECODE | {"max_adapters": 8, "adapter_rank_capacity": 128},
    "prefill": SERVING | {"max_rows": 16, "row_sizes": (16,), "chunk_sizes": (4096,)},
    "offline": SERVING
    | {
        "max_rows": 256,
        "row_sizes": (64, 256),
        "chunk_sizes": (768, 1792),  # with 256 rows 1,024 and 2,048 slots: whole tiles of products
        "max_model_len": 8192,
        "pages": 5500,
    },
    "startup": {"max_rows": 256, "row_sizes": (64, 256), "chunk_sizes": (512, 2048), "max_model_len": 8192},
    "finetune": {"max_rows": 8, "row_sizes": (8,), "max_adapters": 1, "adapter_rank_capacity": 16},
    "finetune_all": {"tape": ("x", "q", "mid", "gate")},
    "finetune_all_lean90": {"tape": ("x", "gate")},
    "finetune_all_lean80": {"tape": ("x", "q")},
    "finetune_down": {"tape": TAPE_NAMES},
}
"""Fields of `EngineConfig` by the kind or the name of a case, the case's own last; what they leave open follows from
the plan (rows, pages, microbatches)."""

TINY = {"max_model_len": 256, "chunk_sizes": (128,), "pages": 64, "max_adapters": 2, "adapter_rank_capacity": 32}
TINY_ROWS = {"max_rows": 4, "row_sizes": (4,)}
TINY_ENGINES = {kind: TINY for kind in ("decode", "decode_lora8")} | {
    kind: TINY | TINY_ROWS for kind in ("prefill", "offline", "finetune", "startup")
}
"""All alike, so that they share what is compiled."""


@dataclass(frozen=True)
class Recipe:
    """A finetuning case: what is adapted, and on which sequences.

    Attributes:
        chat: lengths of `finetune_chat.txt`, packed; otherwise every sequence fills a microbatch.
        memory: the activation memory of it is a metric too.
    """

    modules: tuple[str, ...]
    chat: bool
    memory: bool


RECIPES = {
    "finetune_all": Recipe(TARGET_MODULES, chat=True, memory=True),
    "finetune_all_lean90": Recipe(TARGET_MODULES, chat=True, memory=True),
    "finetune_all_lean80": Recipe(TARGET_MODULES, chat=True, memory=True),
    "finetune_down": Recipe(("down_proj",), chat=False, memory=False),
}


@dataclass(frozen=True)
class StepCase:
    """One thing to measure; cases of a kind share an engine where they can."""

    name: str
    kind: str
    metrics: tuple[str, ...]
    rows: int = 0


@dataclass(frozen=True)
class StepPlan:
    """The [bench] table of a configuration. The defaults are the real thing; `tiny_plan` is for a machine without GPU.

    Attributes:
        shape: key of `flexjax.bench.step_model.SHAPES`; layers: fewer than it has, for a quick look.
        decode_rows, lora_rows: sequences that decode together; gap_rows: whose host gap is reported.
        rows_per_process: how many of them one engine serves; each costs several programs to compile.
        adapters, rank: of the cases with LoRA.
        context: tokens of a decoding sequence, on average.
        decode_iterations: timed at each number of rows.
        prefill_prompts, prefill_length, prefill_repeats: prompts of so many tokens, so often after one not counted.
        offline_requests: of the workload, None for all; longest: lengths of workloads are cut off there.
        microbatch_tokens, backward_window: of packed chat sequences; down_length: of the sequences of `finetune_down`,
            in windows of ``down_window``.
        pool_microbatches: room in the pool, in full microbatches. Above 1 the next one need not wait for the last.
        batch_microbatches: tokens of an optimizer step, in microbatches.
        finetune_seconds: at least, between two optimizer steps; warmup_steps: before them.
        process_seconds: a process that takes longer is ended; `startup`, which starts twice, may take twice as long.
        engines: further fields of `EngineConfig`, by kind or name of a case; they win over `ENGINES`.
    """

    shape: str = "llama-3.1-8b"
    layers: int | None = None
    decode_rows: tuple[int, ...] = (1, 8, 32, 64, 128, 256)
    lora_rows: tuple[int, ...] = (8, 64, 256)
    gap_rows: int = 64
    rows_per_process: int = 3
    adapters: int = 8
    rank: int = 16
    context: int = 1024
    decode_iterations: int = 240
    prefill_prompts: int = 16
    prefill_length: int = 4096
    prefill_repeats: int = 3
    offline_requests: int | None = None
    longest: int | None = None
    microbatch_tokens: int = 4096
    backward_window: int = 2048
    down_length: int = 8192
    down_window: int = 2048
    pool_microbatches: float = 1.0
    batch_microbatches: int = 16
    finetune_seconds: float = 30.0
    warmup_steps: int = 1
    process_seconds: float = 150.0
    engines: Mapping[str, Mapping] = field(default_factory=dict)

    def __post_init__(self):
        check_types(self)
        optional = ("layers", "engines", "shape", "longest", "offline_requests", "decode_rows", "lora_rows")
        for each in fields(self):
            if each.name not in optional:
                check_range(self, each.name, 0.0, open_low=each.name != "warmup_steps")
        unknown = [name for name in self.engines if name not in ENGINES]
        if unknown:
            raise ConfigError(f"engines has {', '.join(unknown)}; it must be some of {', '.join(ENGINES)}")

    @property
    def cases(self) -> tuple[StepCase, ...]:
        """Everything that can be measured, in the order in which it is."""
        return (
            *(self._decode_case(rows) for rows in self.decode_rows),
            *(self._lora_case(rows) for rows in self.lora_rows),
            StepCase("prefill", "prefill", ("prefill_tokens_per_s",)),
            StepCase("offline", "offline", ("offline_output_tokens_per_s",)),
            *(finetune_case(name, recipe) for name, recipe in RECIPES.items()),
            StepCase("startup", "startup", ("startup_cold_s", "startup_warm_s")),
        )

    def chosen(self, only: list[str]) -> list[StepCase]:
        """Cases by their name, their kind or one of their metrics; all if ``only`` is empty. Raises ConfigError."""
        known = {name for case in self.cases for name in (case.name, case.kind, *case.metrics)}
        unknown = [name for name in only if name not in known]
        if unknown:
            names = dict.fromkeys(name for case in self.cases for name in (case.kind, case.name))
            raise ConfigError(f"--only names {', '.join(unknown)}; it must be some of {', '.join(names)}")
        wanted = set(only)
        return [each for each in self.cases if not wanted or wanted & {each.name, each.kind, *each.metrics}]

    def processes(self, cases: list[StepCase]) -> list[tuple[StepCase, ...]]:
        """Cases that one process measures, each with the memory of the device to itself."""
        kinds = dict.fromkeys(case.kind for case in cases)
        of_kind = {kind: [case for case in cases if case.kind == kind] for kind in kinds}
        size = lambda kind: self.rows_per_process if kind.startswith("decode") else 1
        return [group for kind in kinds for group in batched(of_kind[kind], size(kind))]

    def engine_fields(self, case: StepCase) -> dict[str, Any]:
        """What the tables say of a case's engine."""
        own = [self.engines.get(name, {}) for name in (case.kind, case.name)]
        return {**ENGINES.get(case.kind, {}), **ENGINES.get(case.name, {}), **own[0], **own[1]}

    def _decode_case(self, rows: int) -> StepCase:
        gap = ("host_gap_fraction",) if rows == self.gap_rows else ()
        return StepCase(f"decode_{rows}", "decode", (f"decode_step_ms_{rows}", *gap), rows)

    def _lora_case(self, rows: int) -> StepCase:
        return StepCase(f"decode_lora8_{rows}", "decode_lora8", (f"decode_step_lora8_ms_{rows}",), rows)


def finetune_case(name: str, recipe: Recipe) -> StepCase:
    memory = (f"finetune_all_activation_mb_per_token{name.removeprefix('finetune_all')}",) if recipe.memory else ()
    return StepCase(name, "finetune", (f"{name}_tokens_per_s", *memory))


def tiny_plan() -> StepPlan:
    """Every path in seconds on a CPU; the figures mean nothing."""
    return StepPlan(
        shape="tiny",
        decode_rows=(1, 4),
        lora_rows=(4,),
        gap_rows=4,
        adapters=2,
        context=96,
        decode_iterations=24,
        prefill_prompts=4,
        prefill_length=128,
        prefill_repeats=1,
        offline_requests=12,
        longest=60,
        microbatch_tokens=256,
        backward_window=128,
        down_length=256,
        down_window=128,
        batch_microbatches=2,
        finetune_seconds=0.5,
        engines=TINY_ENGINES,
    )


def read_step_plan(path: str | None, platform: str) -> tuple[StepPlan, dict[str, Any]]:
    """The plan, and the [engine] table that holds for every case, of a configuration; without one, those for "gpu",
    or the tiny ones.

    Raises:
        ConfigError: the file cannot be used.
    """
    if path is None:
        return (StepPlan() if platform == "gpu" else tiny_plan()), {}
    tables, base = load_tables(path), Path(path).parent
    engine = dict(tables.get("engine", {}))
    if "model" in engine:
        engine["model"] = resolve_path(engine["model"], "if it exists", base)
    return from_table(StepPlan, tables.get("bench", {}), f"{path} [bench]"), engine
