"""FinetuneJob: values that are accepted, and mistakes that are answered by name."""

import math
import typing

import pytest

from flexjax.config import from_table
from flexjax.fields import ConfigError
from flexjax.finetuning.job import TARGET_MODULES, TRANSITIONS, FinetuneJob, JobStatus
from flexjax.models import lora
from flexjax.steps.update import OPTIMIZERS


def test_a_job_needs_only_a_name_and_data():
    job = FinetuneJob("keeper", [{"prompt": "a", "completion": "b"}])
    assert (job.rank, job.alpha, job.batch_size, job.train_on) == (16, 32, 8, "assistant")
    assert job.target_modules == TARGET_MODULES


def test_scale_is_alpha_over_rank_or_its_root():
    assert FinetuneJob("a", "d", rank=4, alpha=32).scale == 8
    assert FinetuneJob("a", "d", rank=4, alpha=32, use_rslora=True).scale == 16
    assert math.isclose(FinetuneJob("a", "d", rank=3, alpha=1, use_rslora=True).scale, 0.5773502691896258)


def test_target_modules_stand_in_the_models_order():
    assert FinetuneJob("a", "d", target_modules=["down_proj", "q_proj"]).target_modules == ("q_proj", "down_proj")
    assert FinetuneJob("a", "d", target_modules="all-linear").target_modules == TARGET_MODULES


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": ""}, "name is ''"),
        ({"name": "a/b"}, "name is 'a/b'; it names a folder, so it must be text without '/'"),
        ({"data": {"prompt": "a"}}, "data is .*; it must be a JSONL path or an iterable of rows"),
        ({"data": 3}, "data is 3; it must be text or a path or a list"),
        ({"rank": 0}, "rank is 0; it must be at least 1"),
        ({"dropout": 1.0}, "dropout is 1.0; it must be at least 0.0 and less than 1.0"),
        ({"learning_rate": -1e-4}, "learning_rate is -0.0001"),
        ({"learning_rate": float("inf")}, "learning_rate is inf; it must be a number"),
        ({"schedule": "step"}, 'schedule is \'step\'; it must be "cosine" or "linear" or "constant"'),
        ({"optimizer": "adamW"}, "optimizer is 'adamW'; it must be \"adamw\""),
        ({"optimizer": "sgd", "weight_decay": 0.1}, "weight_decay is 0.1, but optimizer 'sgd' has none; use adamw"),
        ({"target_modules": ["q_proj", "qproj"]}, r"target_modules is \['q_proj', 'qproj'\]; it must hold one or more"),
        ({"target_modules": []}, r"target_modules is \[\]"),
        ({"epochs": 0}, "epochs is 0"),
        ({"max_steps": 0}, "max_steps is 0"),
        ({"batch_tokens": 0}, "batch_tokens is 0"),
        ({"weight": 0}, "weight is 0.0; it must be more than 0"),
        ({"max_grad_norm": 0}, "max_grad_norm is 0.0"),
        ({"max_length": 1}, "max_length is 1; it must be at least 2"),
        ({"train_on": "user"}, "train_on is 'user'"),
    ],
)
def test_mistakes_are_named(values, message):
    with pytest.raises(ConfigError, match=message):
        FinetuneJob(**{"name": "a", "data": "d"} | values)


def test_a_table_resolves_its_files(tmp_path):
    (tmp_path / "start").mkdir()
    table = {"name": "a", "data": "rows.jsonl", "validation": "more.jsonl", "init_adapter": "start", "alpha": 8}
    job = from_table(FinetuneJob, table, "run.toml [[finetune]]", tmp_path)
    assert (job.data, job.validation) == (str(tmp_path / "rows.jsonl"), str(tmp_path / "more.jsonl"))
    assert job.init_adapter == str(tmp_path / "start")
    assert from_table(FinetuneJob, table | {"init_adapter": "loaded"}, "x", tmp_path).init_adapter == "loaded"


def test_names_are_those_of_the_model_and_the_update():
    assert TARGET_MODULES == lora.MODULES
    assert set(typing.get_args(typing.get_type_hints(FinetuneJob)["optimizer"])) == set(OPTIMIZERS)


def test_final_statuses_lead_nowhere():
    assert {status for status in JobStatus if status.final} == {"succeeded", "failed", "cancelled"}
    assert set(TRANSITIONS) == set(JobStatus)
