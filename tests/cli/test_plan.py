"""``flexjax plan``: its tables, whose figures are recomputed here by hand."""

import gc
import re

import jax
import pytest

from flexjax.cli import main


@pytest.fixture(scope="module")
def printed(work):
    """What is printed for count.toml, by section."""
    with pytest.MonkeyPatch.context() as patch:
        lines: list[str] = []
        patch.setattr("builtins.print", lambda text: lines.append(text))
        gc.collect()  # what earlier tests left must not go meanwhile
        arrays = len(jax.live_arrays())
        assert main(["plan", str(work / "count.toml"), "--target-modules", "down_proj"]) == 0
        assert len(jax.live_arrays()) == arrays, "a plan must allocate nothing"
    sections = re.split(r"^== (.*) ==\n", lines[0], flags=re.MULTILINE)[1:]
    return dict(zip(sections[::2], sections[1::2], strict=True))


def section(printed, start: str) -> str:
    return next(text for title, text in printed.items() if title.startswith(start))


def test_memory_counts_the_pages(printed):
    """120 pages of 64 tokens, 2 layers, 2 * 4 heads of 4 float32 values: 1.9 MiB."""
    assert re.search(r"pages \(120 of 64 tokens\) +1\.9 MiB", section(printed, "Memory"))


def test_sizes_left_out_are_those_of_the_platform(work, capsys):
    """4 numbers of rows, alone and beside 5 chunks, those with a tape too: 4 + 20 + 20 layouts; 24 with adapters."""
    arguments = ["plan", "--model", str(work / "tiny"), "--platform", "gpu", "--set", "memory_bytes=1000000000"]
    assert main(arguments) == 0
    steps = capsys.readouterr().out.split("\n\n")[0]
    assert "rows that decode 32, 64, 128, 256; slots of steps with prompts or windows 384, 640, 1,024" in steps
    assert "44 layouts, 68 with adapters\nmicrobatches of up to 4,096 tokens, backward units of 2,048" in steps


def test_pruning_needs_no_attention_for_an_adapter_behind_it(printed):
    """In the lowest layer, down_proj's gradient reads gate and up (72 float32 values each) and the cotangent only."""
    lowest = section(printed, "Pruning").split("\n\n")[1]
    assert re.search(r"^gate +yes +288 ", lowest, re.MULTILINE)
    assert re.search(r"^q +no +128 ", lowest, re.MULTILINE)
    assert "adapters on down_proj" in lowest


def test_one_plan_is_taken(printed):
    plans = section(printed, "Rematerialization").splitlines()[1:]
    assert sum(line.startswith("*") for line in plans if line) == 1
    assert sum(line.startswith("-") for line in plans if line) == 1
    assert plans[0].split()[-1] == "x"


def test_sharding_is_chosen_for_the_adapted_module(printed):
    assert re.search(r"^down_proj +row ", section(printed, "Parallelization"), re.MULTILINE)


def test_what_cannot_fit_is_refused_with_the_setting(work, capsys):
    assert main(["plan", str(work / "count.toml"), "--set", "memory_bytes=1000000"]) == 2
    assert "memory_bytes" in capsys.readouterr().err
