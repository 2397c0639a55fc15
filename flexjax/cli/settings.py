"""Settings: what CONFIG and the command line say together about the engine and the finetuning jobs."""

import argparse
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from flexjax.config import EngineConfig, from_table, load_tables, resolve_path
from flexjax.fields import ConfigError
from flexjax.finetuning.job import FinetuneJob

OVERRIDES = ("model", "dtype", "tp")
"""Options that are fields of the [engine] table under the same name."""


@dataclass(frozen=True)
class Settings:
    """Attributes:
    jobs: one per [[finetune]] table, names distinct.
    """

    engine: EngineConfig
    jobs: tuple[FinetuneJob, ...]

    def with_checkpoints(self, directory: Path) -> "Settings":
        """Checkpoints go there unless CONFIG says where."""
        if self.engine.checkpoint_dir is not None:
            return self
        return replace(self, engine=replace(self.engine, checkpoint_dir=str(directory)))


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("the engine")
    group.add_argument("config", nargs="?", metavar="CONFIG", help="TOML file with [engine] and [[finetune]] tables")
    group.add_argument("--model", metavar="PATH", help="model directory, .gguf file or hub name")
    group.add_argument("--dtype", choices=("float32", "bfloat16"), help="of weights and activations")
    group.add_argument("--tp", type=int, metavar="N", help="devices that share every weight")
    group.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="any other field of [engine], as TOML"
    )


def read_settings(arguments: argparse.Namespace) -> Settings:
    """Settings of a command that has the engine's arguments; options win over CONFIG.

    Raises:
        ConfigError: neither CONFIG nor a model is given, or either says something impossible.
    """
    overrides = {name: getattr(arguments, name) for name in OVERRIDES if getattr(arguments, name) is not None}
    overrides |= dict(map(parse_assignment, arguments.set))
    if arguments.config is None:
        if "model" not in overrides:
            raise ConfigError("there is no model to run; give a CONFIG, or --model PATH")
        return Settings(from_table(EngineConfig, overrides, "command line", Path()), ())
    path = Path(arguments.config)
    if path.is_dir() or path.suffix in (".gguf", ".safetensors"):
        raise ConfigError(f"{path} is no configuration file; for a model say --model {path}")
    tables = load_tables(path)
    table = tables.get("engine", {}) | from_here(overrides)
    where = f"{path} [engine]" + (" and command line" if overrides else "")
    engine = from_table(EngineConfig, table, where, path.parent)
    return Settings(engine, tuple(read_jobs(tables.get("finetune", []), path)))


def from_here(overrides: dict[str, Any]) -> dict[str, Any]:
    """Paths of the command line made absolute, since those of a file are relative to it."""
    kinds = {each.name: each.metadata.get("path") for each in fields(EngineConfig)}
    return {name: resolve_path(value, kinds.get(name), Path.cwd()) for name, value in overrides.items()}


def read_jobs(tables: list[dict[str, Any]], path: Path) -> Iterator[FinetuneJob]:
    names: set[str] = set()
    for number, table in enumerate(tables, 1):
        where = f"{path} [[finetune]] number {number}"
        job = from_table(FinetuneJob, table, where, path.parent)
        if job.name in names:
            raise ConfigError(f"{where}: the name {job.name!r} is taken by another job; names must differ")
        names.add(job.name)
        yield job


def parse_assignment(text: str) -> tuple[str, Any]:
    """``max_rows=4`` as ("max_rows", 4); what is no TOML value is text."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"--set is {text!r}; it must be KEY=VALUE")
    try:
        return key.strip(), tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return key.strip(), value
