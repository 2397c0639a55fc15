"""main: picks a command, and decides how errors look. It loads only the command that is asked for, so help is quick."""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import NoReturn

from flexjax.fields import ConfigError
from flexjax.version import __version__

COMMANDS = {
    "generate": "continue prompts and print the texts",
    "run": "serve requests on standard input, one JSON object a line, beside the finetuning jobs of CONFIG",
    "serve": "serve the OpenAI API over HTTP, beside the finetuning jobs of CONFIG",
    "finetune": "run the finetuning jobs of CONFIG and write their adapters",
    "export": "write an adapter in PEFT's format, or merged into the model's weights",
    "plan": "print memory, pruning, rematerialization and sharding without starting anything",
    "bench": "measure kernels, or whole steps, and write the figures",
    "demo": "serve a small real model and finetune it at the same time, with a report",
}
"""Each is a module of this package with ``add_arguments(parser)`` and ``run(arguments) -> exit code``."""

EXTRAS = {"serve": "server", "demo": "bench"}
"""Commands that need more packages, with the extra that brings them."""

USER_ERROR, INTERRUPTED = 2, 130


class Parser(argparse.ArgumentParser):
    """Wrong arguments are the user's errors like all others."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (see {self.prog} --help)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code.

    A user's mistake is one message and code 2; a traceback means a mistake of ours (``--debug`` shows it for both).
    """
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        return dispatch(words)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # whoever read our output has gone; nothing more may be written, not even at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError) as error:
        if "--debug" in words:
            raise
        print(f"error: {describe(error)}", file=sys.stderr)
        return USER_ERROR


def dispatch(words: list[str]) -> int:
    top = Parser("flexjax", description="Serve a language model and finetune LoRA adapters of it side by side.")
    top.formatter_class = argparse.RawDescriptionHelpFormatter
    top.epilog = "\n".join(["commands:", *(f"  {name:<10} {summary}" for name, summary in COMMANDS.items())])
    top.add_argument("--version", action="version", version=f"flexjax {__version__}")
    top.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="one of the commands below")
    top.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="flexjax COMMAND --help lists them")
    chosen = top.parse_args(words)
    command = load(chosen.command)
    parser = Parser(f"flexjax {chosen.command}", description=command.__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    command.add_arguments(parser)
    arguments = parser.parse_args(chosen.arguments)
    arguments.command_line = ["flexjax", *words]
    return command.run(arguments)


def load(command: str) -> ModuleType:
    """Raises ConfigError if the command's packages are not installed."""
    try:
        return importlib.import_module(f"flexjax.cli.{command}")
    except ModuleNotFoundError as error:
        if command not in EXTRAS or error.name.startswith("flexjax"):
            raise
        extra = f"flexjax[{EXTRAS[command]}]"
        raise ConfigError(f"flexjax {command} needs {error.name}, which is not installed; install {extra}") from error


def describe(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return str(error) or type(error).__name__
