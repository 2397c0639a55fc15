"""EngineConfig, and how the tables of a TOML file become frozen, checked values. It knows no jax and no model."""

import dataclasses
import difflib
import tomllib
import types
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from flexjax.fields import ConfigError, check_multiple, check_range, check_types
from flexjax.layout import PAGE_TOKENS, RANK_UNIT
from flexjax.sizes import Sizes, sizes_for

TABLES = ("engine", "finetune", "server", "bench", "demo")
REPEATED_TABLES = ("finetune",)
PATH = types.MappingProxyType({"path": "always"})
"""Field metadata: text in a configuration file is a path, relative to that file."""
PATH_OR_NAME = types.MappingProxyType({"path": "if it exists"})
"""Field metadata: text is a path only if it exists there or looks like one (``./``, ``../``, ``~``)."""


@dataclass(frozen=True)
class EngineConfig:
    """What the machine may use and which model runs on it.

    None means "decide from the model, the device or the memory"; ``resolved`` and the memory plan make new values of
    it. Sizes that are left out are those of `flexjax.sizes`.

    Attributes:
        model: directory of safetensors, ``.gguf`` file or hub name.
        revision: of a hub name.
        load_format: "dummy" makes random weights on the device.
        max_model_len: longest sequence in tokens, prompt and answer together.
        max_rows: sequences that decode together; left out, the last of ``row_sizes``.
        row_sizes: decode slots of the layouts, ascending, the last one ``max_rows``. On a GPU multiples of 8: around
            products of other sizes XLA copies their inputs and outputs.
        chunk_sizes: chunk slots of the layouts, ascending multiples of 64.
        step_sizes: slots of the layouts with a chunk, rows included, ascending; each number of rows gets the chunks
            that fill them, in multiples of 64 and at least 64. Win over ``chunk_sizes``. A GPU computes in waves of
            tiles: on 132 multiprocessors multiples of 1,024 slots fill them for most models.
        pages: pages in the pool; None takes what the memory plan leaves.
        memory_fraction: share of the device's memory that flexjax may use.
        memory_bytes: the same as a number of bytes; wins over the fraction.
        max_adapters: places for adapters on the device, not counting "no adapter"; others wait in the host's memory
            and come when they are asked for. A running job keeps one.
        adapter_rank_capacity: sum of the ranks of adapters on the device, a multiple of 8.
        adapter_host_bytes: of adapters in the host's memory; beyond it those that are in a file are read again from
            there.
        microbatch_tokens: slots of a finetuning microbatch, a multiple of ``backward_window``.
        backward_window: slots of one backward unit, a multiple of 64.
        tape: names of activations to save, or "auto" for the plan that fits the memory.
        max_running_jobs: finetuning jobs that hold masters and optimizer state at once; more wait.
        policy: name of the scheduler's policy; "auto" is "co_serve" with an objective per token, else "flat_out".
        policy_options: arguments of the policy, as pairs; a mapping is accepted.
        tpot_objective_ms, itl_objective_ms, ttft_objective_ms: latency objectives in milliseconds, None for none: the
            mean time per output token of a request, every single gap between two of its tokens, and the first one.
        objective_margin: share of the objective that is left unused, in [0, 1).
        tp: devices on the tensor-parallel axis.
        served_model_name: what the HTTP server calls the model.

    Raises:
        ConfigError: a value has the wrong type or is outside its range.
    """

    model: str = field(metadata=PATH_OR_NAME)
    revision: str | None = None
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    load_format: Literal["auto", "dummy"] = "auto"
    seed: int = 0
    max_model_len: int | None = None
    max_rows: int | None = None
    row_sizes: tuple[int, ...] | None = None
    chunk_sizes: tuple[int, ...] | None = None
    step_sizes: tuple[int, ...] | None = None
    pages: int | None = None
    memory_fraction: float = 0.9
    memory_bytes: int | None = None
    max_adapters: int = 4
    adapter_rank_capacity: int = 64
    adapter_host_bytes: int = 4 * 2**30
    microbatch_tokens: int | None = None
    backward_window: int | None = None
    tape: Literal["auto"] | tuple[str, ...] = "auto"
    max_running_jobs: int = 2
    prefix_caching: bool = True
    policy: str = "auto"
    policy_options: Mapping[str, Any] | tuple[tuple[str, Any], ...] = ()
    tpot_objective_ms: float | None = None
    itl_objective_ms: float | None = None
    ttft_objective_ms: float | None = None
    objective_margin: float = 0.05
    tp: int = 1
    compilation_cache: str | None = field(default=None, metadata=PATH)
    checkpoint_dir: str | None = field(default=None, metadata=PATH)
    served_model_name: str | None = None

    def __post_init__(self):
        check_types(self)
        if not self.model:
            raise ConfigError("model is empty; name a directory, a .gguf file or a hub model")
        object.__setattr__(self, "policy_options", tuple(sorted(dict(self.policy_options).items())))
        check_range(self, "seed", 0)
        for name in ("max_rows", "pages", "memory_bytes", "max_adapters", "adapter_host_bytes", "max_running_jobs"):
            check_range(self, name, 1)
        check_range(self, "tp", 1)
        check_range(self, "max_model_len", 2)
        check_range(self, "memory_fraction", 0.0, 1.0, open_low=True)
        check_range(self, "objective_margin", 0.0, 1.0, open_high=True)
        for name in ("tpot_objective_ms", "itl_objective_ms", "ttft_objective_ms"):
            check_range(self, name, 0.0, open_low=True)
        self._check_grids()

    def _check_grids(self) -> None:
        check_multiple(self, "adapter_rank_capacity", RANK_UNIT)
        check_multiple(self, "backward_window", PAGE_TOKENS)
        if self.backward_window is None:
            check_multiple(self, "microbatch_tokens", PAGE_TOKENS)
        else:
            check_multiple(self, "microbatch_tokens", self.backward_window, "backward_window")
        sizes = self.chunk_sizes
        if sizes is not None and (not sizes or any(size < 1 or size % PAGE_TOKENS for size in sizes)):
            raise ConfigError(f"chunk_sizes is {list(sizes)}; it needs multiples of {PAGE_TOKENS}")
        if self.step_sizes is not None and (not self.step_sizes or min(self.step_sizes) < PAGE_TOKENS):
            raise ConfigError(f"step_sizes is {list(self.step_sizes)}; it needs numbers of at least {PAGE_TOKENS}")
        if self.row_sizes is not None:
            self._check_row_sizes(self.row_sizes)
        for name in ("chunk_sizes", "step_sizes", "row_sizes"):
            sizes = getattr(self, name) or ()
            if list(sizes) != sorted(set(sizes)):
                raise ConfigError(f"{name} is {list(sizes)}; the sizes must ascend")

    def _check_row_sizes(self, sizes: tuple[int, ...]) -> None:
        if not sizes or sizes[0] < 1 or self.max_rows not in (None, sizes[-1]):
            end = "" if self.max_rows is None else f" that end with max_rows ({self.max_rows})"
            raise ConfigError(f"row_sizes is {list(sizes)}; it needs numbers of at least 1{end}")

    def chunks_beside(self, rows: int) -> tuple[int, ...]:
        """Chunk slots of the layouts of so many rows."""
        if self.step_sizes is None:
            return self.chunk_sizes
        filling = {max(size - rows, PAGE_TOKENS) // PAGE_TOKENS * PAGE_TOKENS for size in self.step_sizes}
        return tuple(sorted(filling))

    @property
    def options(self) -> dict[str, Any]:
        """``policy_options`` as a new dictionary."""
        return dict(self.policy_options)

    def resolved(self, model_max_len: int, platform: str) -> "EngineConfig":
        """A configuration whose length, sizes, policy and name are decided.

        Args:
            model_max_len: the model's context length, tokens.
            platform: jax's name for the devices that it will run on, "cpu" or "gpu".
        """
        length = self.max_model_len or model_max_len
        if length > model_max_len:
            raise ConfigError(f"max_model_len is {length}; the model's context ends at {model_max_len} tokens")
        objective = self.tpot_objective_ms or self.itl_objective_ms
        policy = self.policy if self.policy != "auto" else "co_serve" if objective else "flat_out"
        name = Path(self.model).name if Path(self.model).exists() else self.model
        return dataclasses.replace(
            self,
            max_model_len=length,
            **self._sizes(sizes_for(platform), policy),
            policy=policy,
            served_model_name=self.served_model_name or name,
        )

    def _sizes(self, usual: Sizes, policy: str) -> dict[str, Any]:
        """The sizes that are given, and beside them what is usual."""
        window = self.backward_window or usual.window_of(self.microbatch_tokens)
        microbatch = self.microbatch_tokens or -(-usual.microbatch_tokens // window) * window
        if policy == "finetune_only":
            usual = usual.without_requests(microbatch)
        rows = self.max_rows or (self.row_sizes[-1] if self.row_sizes else usual.max_rows)
        given = self.chunk_sizes or self.step_sizes
        return {
            "max_rows": rows,
            "row_sizes": self.row_sizes or usual.row_sizes(rows),
            "chunk_sizes": self.chunk_sizes if given else usual.chunk_sizes,
            "step_sizes": self.step_sizes if given else usual.step_sizes,
            "backward_window": window,
            "microbatch_tokens": microbatch,
        }


def load_tables(path: str | Path) -> dict[str, Any]:
    """Reads a configuration file into its tables: a dictionary each, ``finetune`` a list of them.

    Raises:
        ConfigError: no such file, TOML that does not parse (names the line), an unknown table.
    """
    path = Path(path)
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from error
    for name, table in tables.items():
        wanted = f"[[{name}]]" if name in REPEATED_TABLES else f"[{name}]"
        if name not in TABLES and not isinstance(table, dict | list):
            raise ConfigError(f"{path}: the key {name!r} stands outside a table; put it under {table_names()}")
        if name not in TABLES:
            raise ConfigError(f"{path}: unknown table {name!r}{nearest(name, TABLES)}; tables are {table_names()}")
        if not isinstance(table, list if name in REPEATED_TABLES else dict):
            raise ConfigError(f"{path}: {name!r} must be written as the table {wanted}")
    return tables


def from_table(cls: type, table: Mapping[str, Any], where: str, base: Path | None = None) -> Any:
    """Makes the dataclass ``cls`` of a table; relative paths in its path fields resolve against ``base``.

    Args:
        where: the file and table, for messages.

    Raises:
        ConfigError: an unknown or missing key, or a value that ``cls`` refuses; the message begins with ``where``.
    """
    fields = {each.name: each for each in dataclasses.fields(cls) if each.init}
    for key in table:
        if key not in fields:
            raise ConfigError(f"{where}: unknown key {key!r}{nearest(key, fields)}")
    needed = [name for name, each in fields.items() if each.default is each.default_factory is dataclasses.MISSING]
    missing = [name for name in needed if name not in table]
    if missing:
        raise ConfigError(f"{where}: {' and '.join(missing)} must be given")
    values = {key: resolve_path(value, fields[key].metadata.get("path"), base) for key, value in table.items()}
    try:
        return cls(**values)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error


def resolve_path(value: Any, kind: str | None, base: Path | None) -> Any:
    if kind is None or not isinstance(value, str) or not value:
        return value
    path = (base or Path()) / Path(value).expanduser()
    looks_like_path = value.startswith(("./", "../", "~", "/")) or value in (".", "..")
    return str(path) if kind == "always" or looks_like_path or path.exists() else value


def table_names() -> str:
    return ", ".join(f"[[{name}]]" if name in REPEATED_TABLES else f"[{name}]" for name in TABLES)


def nearest(name: str, valid: Iterable[str]) -> str:
    """A clause that proposes the valid name most like ``name``, or nothing."""
    close = difflib.get_close_matches(name, list(valid), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
