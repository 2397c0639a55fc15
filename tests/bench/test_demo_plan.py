"""The demo's configuration: the shipped one is whole, and each mistake is named with its file."""

import json
import re
from pathlib import Path

import pytest

from flexjax.bench.demo_plan import read_plan
from flexjax.bench.sample_model import SAMPLE_MODELS
from flexjax.fields import ConfigError

SHIPPED = Path(__file__).parents[2] / "configs" / "demo.toml"

ENGINE = 'model = "some/model"\ntpot_objective_ms = 100'
JOB = 'name = "pirate"\ndata = "rows.jsonl"\nepochs = 3\nevaluate_every = 5'
DEMO = (
    'questions = "questions.txt"\nheld_out = "held_out.jsonl"\nsignature = "Arr"\noutput = "out"\n'
    "tighter_objective_ms = 50\nshort_steps = 4\nshort_tighter_seconds = 2.5\ntighter_seconds = 9"
)
HELD_OUT = [{"role": role, "content": "Hi"} for role in ("system", "user", "assistant")]


@pytest.fixture
def write(tmp_path):
    (tmp_path / "questions.txt").write_text("Why?\n\n  Who?  \n")
    (tmp_path / "held_out.jsonl").write_text(json.dumps({"messages": HELD_OUT}) + "\n")

    def written(engine: str = ENGINE, jobs: tuple[str, ...] = (JOB,), demo: str = DEMO) -> Path:
        tables = [f"[engine]\n{engine}", *(f"[[finetune]]\n{job}" for job in jobs), f"[demo]\n{demo}"]
        path = tmp_path / "demo.toml"
        path.write_text("\n".join(tables))
        return path

    return written


def test_the_shipped_configuration_is_whole():
    plan = read_plan(SHIPPED, short=False, output=None)
    assert plan.engine.model in SAMPLE_MODELS
    assert Path(plan.job.data).is_file() and Path(plan.job.validation).is_file()
    assert plan.output.resolve() == SHIPPED.parents[1] / "runs" / "demo"  # which git ignores
    trained = Path(plan.job.data).read_text()
    for messages in plan.held_out:
        assert messages[-1]["role"] == "user"
        assert json.dumps(messages[-1]["content"], ensure_ascii=False) not in trained, "a held-out question is trained"
    assert sum(plan.demo.signature in line for line in trained.splitlines()) == len(trained.splitlines())
    assert not any(plan.demo.signature in question for question in plan.questions)
    head = SHIPPED.read_text().split("[engine]")[0]
    assert "make demo" in head, "the file opens with the command to run"


def test_short_takes_fewer_steps_and_less_time(write):
    full = read_plan(write(), short=False, output=None)
    short = read_plan(write(), short=True, output=Path("elsewhere"))
    assert (full.job.max_steps, full.job.evaluate_every, full.tighter_seconds) == (None, 5, 9)
    assert (short.job.max_steps, short.job.evaluate_every, short.tighter_seconds) == (4, None, 2.5)
    assert full.output == write().parent / "out" and short.output == Path("elsewhere")
    assert full.questions == ("Why?", "Who?")
    assert full.held_out == (tuple(HELD_OUT[:2]),)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"jobs": ()}, "has no table [finetune]; a demo needs [engine], [[finetune]] and [demo]"),
        ({"jobs": (JOB, JOB)}, "has 2 tables [[finetune]]; a demo runs one job"),
        ({"engine": 'model = "m"'}, "tighter_objective_ms is 50.0; it must be less than tpot_objective_ms"),
        ({"engine": 'model = "m"\ntpot_objective_ms = 50'}, "of [engine], which is 50.0"),
        ({"demo": DEMO + "\nrequest_rat = 1"}, "[demo]: unknown key 'request_rat'"),
        ({"demo": DEMO + "\nrequest_rate = 0"}, "[demo]: request_rate is 0.0; it must be more than 0.0"),
        ({"demo": DEMO.replace('"Arr"', '" "')}, "signature is ' '"),
        ({"demo": DEMO.replace("questions.txt", "missing.txt")}, "missing.txt: No such file"),
    ],
)
def test_mistakes_are_named(write, changes, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        read_plan(write(**changes), short=False, output=None)


@pytest.mark.parametrize("line", ["{", "[]", '{"messages": []}', json.dumps({"messages": HELD_OUT[:2]})])
def test_a_held_out_line_that_cannot_be_used_is_named(write, line):
    path = write()
    held_out = path.parent / "held_out.jsonl"
    held_out.write_text(held_out.read_text() + line + "\n")
    with pytest.raises(ConfigError, match=r"held_out\.jsonl, line 2: it must be"):
        read_plan(path, short=False, output=None)


def test_empty_files_are_refused(write):
    path = write()
    (path.parent / "questions.txt").write_text("\n \n")
    with pytest.raises(ConfigError, match="holds no question"):
        read_plan(path, short=False, output=None)
    (path.parent / "questions.txt").write_text("Why?\n")
    (path.parent / "held_out.jsonl").write_text("")
    with pytest.raises(ConfigError, match="holds no conversation"):
        read_plan(path, short=False, output=None)
