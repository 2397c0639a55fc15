"""Choosing a command, and how errors look: one message and code 2 for the user's, a traceback for ours."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from flexjax.cli import main
from flexjax.cli.entry import COMMANDS
from flexjax.version import __version__

ROOT = Path(__file__).parents[2]
QUICK = ("jax", "jaxlib", "flax", "numpy", "transformers", "safetensors")


@pytest.mark.parametrize("words", [["--version"], ["--help"], ["run", "--help"], ["finetune", "--help"]])
def test_help_and_version_load_no_jax(words):
    code = (
        "import sys\nfrom flexjax.cli import main\n"
        f"try: main({words!r})\nexcept SystemExit: pass\n"
        f"print('loaded:', [name for name in {QUICK!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    *shown, loaded = done.stdout.splitlines()
    assert loaded == "loaded: []" and shown
    assert words != ["--version"] or shown == [f"flexjax {__version__}"]


def test_help_lists_every_command(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert all(f"  {name} " in shown for name in ("generate", "run", "finetune", "export", "plan", "demo"))


def command(monkeypatch, run):
    """Replace the command "plan" by one that does only this."""
    module = SimpleNamespace(__doc__="x", add_arguments=lambda parser: None, run=run)
    monkeypatch.setitem(sys.modules, "flexjax.cli.plan", module)


def failing(error):
    def run(_):
        raise error

    return run


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (ValueError("pages is 3; it must be 4"), 2, "error: pages is 3; it must be 4\n"),
        (FileNotFoundError("no config.json in x"), 2, "error: no config.json in x\n"),
        (PermissionError(13, "Permission denied", "out"), 2, "error: out: Permission denied\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_errors_of_the_user_are_one_message(monkeypatch, capsys, error, code, message):
    command(monkeypatch, failing(error))
    assert main(["plan"]) == code
    assert capsys.readouterr() == ("", message)


def test_errors_of_ours_show_a_traceback(monkeypatch):
    command(monkeypatch, failing(KeyError("x")))
    with pytest.raises(KeyError):
        main(["plan"])


def test_debug_shows_a_traceback_for_all(monkeypatch):
    command(monkeypatch, failing(ValueError("x")))
    with pytest.raises(ValueError, match="x"):
        main(["plan", "--debug"])


def test_a_command_returns_the_exit_code(monkeypatch):
    command(monkeypatch, lambda arguments: len(arguments.command_line))
    assert main(["plan"]) == 2
    assert main(["plan", "--debug"]) == 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["fly"], "invalid choice: 'fly'"),
        (["generate", "--model", "m", "--fly"], "unrecognized arguments: --fly (see flexjax generate --help)"),
        (["generate", "--model", "m"], "there is no prompt"),
        (["generate", "--prompt", "a"], "give a CONFIG, or --model PATH"),
        (["generate", "--prompt", "a", "--model", "/no/such"], "model '/no/such' does not exist"),
        (["generate", "--prompt", "a", "--model", "/no/such.gguf"], "no such directory or .gguf file"),
        (["generate", "--prompt", "a", "--model", "m", "--temperature", "-1"], "temperature is -1.0; it must be in"),
        (
            ["generate", "--prompt", "a", "--model", "m", "--use", "b"],
            "--use is 'b'; name that adapter with --adapter b=",
        ),
        (["generate", "--prompts", "/no/such", "--model", "m"], "/no/such: No such file or directory"),
        (
            ["run", "--model", "m", "--adapter", "b=/no/such"],
            "argument --adapter: the directory /no/such of 'b' does not exist",
        ),
        (["run", "--model", "m", "--adapter", "b"], "argument --adapter: 'b' is not NAME=DIR"),
        (["run", "/no/such.toml"], "cannot read the configuration /no/such.toml"),
        (["run", "/"], "for a model say --model /"),
        (["run", "--model", "m", "--set", "max_rows"], "--set is 'max_rows'; it must be KEY=VALUE"),
        (["run", "--model", "m", "--set", "max_row=4"], "unknown key 'max_row' (did you mean 'max_rows'?)"),
        (["run", "--model", "m", "--set", "pages=0"], "pages is 0; it must be at least 1"),
        (["finetune", "--model", "m"], "CONFIG needs a [[finetune]] table"),
        (["export", "--model", "/no/such", "--adapter", "a", "--output", "o"], "model '/no/such' does not exist"),
        (["plan", "--model", "/no/such"], "model '/no/such' does not exist"),
    ],
)
def test_mistakes_are_refused_before_anything_starts(capsys, words, message):
    assert main(words) == 2
    out, error = capsys.readouterr()
    assert out == "" and error.startswith("error: ") and error.count("\n") == 1 and message in error


def test_commands_are_modules():
    assert all((ROOT / "flexjax" / "cli" / f"{name}.py").is_file() for name in COMMANDS)
