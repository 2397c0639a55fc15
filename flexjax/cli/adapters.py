"""Options that name adapters, and loading them."""

import argparse
from pathlib import Path

import flexjax
from flexjax.fields import ConfigError


def add_adapter_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="NAME=DIR",
        type=parse_adapter,
        help="serve the PEFT adapter in DIR as NAME; may be given several times",
    )


def parse_adapter(text: str) -> tuple[str, Path]:
    """Raises ArgumentTypeError if the text is not NAME=DIR, or there is no such directory."""
    name, equals, directory = text.partition("=")
    if not equals or not name or not directory:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=DIR")
    if not Path(directory).is_dir():
        raise argparse.ArgumentTypeError(f"the directory {directory} of {name!r} does not exist")
    return name, Path(directory)


def load_adapters(engine: "flexjax.Engine", adapters: list[tuple[str, Path]]) -> None:
    """Raises ConfigError for a name that is the base model's, or that is given twice, before any is loaded."""
    names = [name for name, _ in adapters]
    for name in names:
        if name in (engine.config.served_model_name, engine.config.model):
            raise ConfigError(f"--adapter takes the name {name!r}, which is the base model's; choose another")
        if names.count(name) > 1:
            raise ConfigError(f"--adapter takes the name {name!r} {names.count(name)} times; names must differ")
    for name, directory in adapters:
        engine.load_adapter(name, directory)
