"""What CONFIG and the command line say together."""

import argparse
import re
from pathlib import Path

import pytest

from flexjax.cli.settings import add_engine_arguments, parse_assignment, read_settings
from flexjax.config import EngineConfig
from flexjax.fields import ConfigError
from flexjax.finetuning.job import FinetuneJob

ROOT = Path(__file__).parents[2]


def settings(*words):
    parser = argparse.ArgumentParser()
    add_engine_arguments(parser)
    return read_settings(parser.parse_args(list(words)))


def test_options_win_over_the_file_and_paths_start_where_they_are_written(tmp_path, monkeypatch):
    (tmp_path / "a" / "model").mkdir(parents=True)
    (tmp_path / "b").mkdir()
    config = tmp_path / "a" / "c.toml"
    config.write_text('[engine]\nmodel = "model"\nmax_rows = 2\ncheckpoint_dir = "kept"\ndtype = "bfloat16"\n')
    monkeypatch.chdir(tmp_path / "b")
    read = settings("../a/c.toml", "--dtype", "float32", "--set", "compilation_cache=here", "--set", "max_rows=3")
    assert Path(read.engine.model).resolve() == tmp_path / "a" / "model"
    assert Path(read.engine.checkpoint_dir).resolve() == tmp_path / "a" / "kept"
    assert Path(read.engine.compilation_cache) == tmp_path / "b" / "here"
    assert (read.engine.dtype, read.engine.max_rows) == ("float32", 3)


def test_a_model_alone_is_enough():
    read = settings("--model", "some/name", "--tp", "2")
    assert read.engine == EngineConfig(model="some/name", tp=2) and read.jobs == ()


def test_jobs_are_read_in_order_and_share_no_name(tmp_path):
    config = tmp_path / "c.toml"
    config.write_text('[engine]\nmodel="m"\n[[finetune]]\nname="a"\ndata="x"\n[[finetune]]\nname="b"\ndata="y"\n')
    assert [job.name for job in settings(str(config)).jobs] == ["a", "b"]
    assert settings(str(config)).jobs[0] == FinetuneJob("a", str(tmp_path / "x"))
    config.write_text(config.read_text().replace('"b"', '"a"'))
    with pytest.raises(ConfigError, match=r"number 2: the name 'a' is taken"):
        settings(str(config))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("pages=4", ("pages", 4)),
        ("row_sizes=[2, 4]", ("row_sizes", [2, 4])),
        ("prefix_caching=false", ("prefix_caching", False)),
        ("policy=flat_out", ("policy", "flat_out")),
        ('policy="a=b"', ("policy", "a=b")),
    ],
)
def test_assignments_are_toml_or_text(text, expected):
    assert parse_assignment(text) == expected


def test_the_example_explains_every_setting_and_can_be_used():
    read = settings(str(ROOT / "configs" / "example.toml"))
    text = (ROOT / "configs" / "example.toml").read_text()
    shown = set(re.findall(r"^(?:# )?(\w+) = ", text, re.MULTILINE))
    words_only = {"revision", "pages", "memory_bytes", "policy_options", "compilation_cache"}
    assert set(EngineConfig.__dataclass_fields__) - shown == words_only, "keys that only words mention"
    (job,) = read.jobs
    assert Path(job.data).is_file() and Path(job.validation).is_file()
    assert set(FinetuneJob.__dataclass_fields__) - shown == {"max_steps", "batch_tokens"}
