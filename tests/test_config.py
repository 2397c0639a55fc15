"""Configuration files: what is accepted, and that every mistake is answered by name."""

import dataclasses
from dataclasses import dataclass, field

import pytest

from flexjax.config import PATH, PATH_OR_NAME, EngineConfig, from_table, load_tables
from flexjax.engine.startup import policy_of
from flexjax.fields import ConfigError
from flexjax.scheduler.policies import POLICIES

ENGINE = """
[engine]
model = "tiny"
max_rows = 4
memory_fraction = 1
chunk_sizes = [64, 128]
policy_options = {percent = 20.0, n = 3}
"""


@dataclass(frozen=True)
class Places:
    data: str = field(metadata=PATH)
    model: str = field(default="hub/name", metadata=PATH_OR_NAME)
    label: str = "x"


def write(tmp_path, text):
    path = tmp_path / "run.toml"
    path.write_text(text)
    return path


def engine(**values):
    return EngineConfig(**{"model": "m"} | values)


def test_a_table_becomes_a_configuration(tmp_path):
    tables = load_tables(write(tmp_path, ENGINE + '[[finetune]]\nname = "a"\n[[finetune]]\nname = "b"\n'))
    config = from_table(EngineConfig, tables["engine"], "run.toml [engine]", tmp_path)
    assert (config.model, config.max_rows, config.chunk_sizes) == ("tiny", 4, (64, 128))
    assert isinstance(config.memory_fraction, float)
    assert config.options == {"n": 3, "percent": 20.0}
    assert [table["name"] for table in tables["finetune"]] == ["a", "b"]


def test_the_default_configuration_is_hashable_and_equal_to_itself():
    config = engine(policy_options={"n": 2})
    assert config == engine(policy_options=(("n", 2),))
    assert hash(config) == hash(dataclasses.replace(config))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "[engin]\nmodel = 'x'",
            r"unknown table 'engin' \(did you mean 'engine'\?\); tables are \[engine\], \[\[finetune",
        ),
        ("model = 'x'", r"the key 'model' stands outside a table; put it under \[engine\]"),
        ("[finetune]\nname = 'x'", r"'finetune' must be written as the table \[\[finetune\]\]"),
        ("[[engine]]\nmodel = 'x'", r"'engine' must be written as the table \[engine\]"),
        ("[engine]\nmodel =\n", r"run.toml is not valid TOML: .*line 2"),
    ],
)
def test_a_bad_file_is_refused(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        load_tables(write(tmp_path, text))


def test_an_absent_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot read the configuration .*none.toml: No such file"):
        load_tables(tmp_path / "none.toml")


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"model": "m", "max_row": 4}, r"^here: unknown key 'max_row' \(did you mean 'max_rows'\?\)$"),
        ({"model": "m", "zzz": 4}, r"^here: unknown key 'zzz'$"),
        ({"seed": 1}, "^here: model must be given$"),
        ({"model": "m", "max_rows": "4"}, "^here: max_rows is '4'; it must be a whole number$"),
        ({"model": "m", "max_rows": 4.0}, "max_rows is 4.0; it must be a whole number"),
        ({"model": "m", "max_rows": True}, "max_rows is True; it must be a whole number"),
        ({"model": "m", "prefix_caching": 1}, "prefix_caching is 1; it must be true or false"),
        ({"model": "m", "dtype": "float16"}, 'dtype is \'float16\'; it must be "float32" or "bfloat16"'),
        ({"model": "m", "chunk_sizes": [64, "x"]}, "chunk_sizes is .*; it must be a list, each a whole number"),
        ({"model": "m", "tape": "some"}, "tape is 'some'; it must be \"auto\" or a list, each text"),
        ({"model": "m", "policy_options": "n"}, "policy_options is 'n'; it must be a table or a list"),
    ],
)
def test_wrong_keys_and_types_are_refused_by_name(table, message):
    with pytest.raises(ConfigError, match=message):
        from_table(EngineConfig, table, "here")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model": ""}, "model is empty"),
        ({"seed": -1}, "seed is -1; it must be at least 0"),
        ({"max_rows": 0}, "max_rows is 0; it must be at least 1"),
        ({"pages": 0}, "pages is 0"),
        ({"memory_fraction": 0}, "memory_fraction is 0.0; it must be more than 0.0 and at most 1.0"),
        ({"memory_fraction": float("nan")}, "memory_fraction is nan; it must be a number"),
        ({"objective_margin": 1.0}, "objective_margin is 1.0; it must be at least 0.0 and less than 1.0"),
        ({"tpot_objective_ms": 0}, "tpot_objective_ms is 0.0; it must be more than 0"),
        ({"chunk_sizes": (64, 100)}, r"chunk_sizes is \[64, 100\]; it needs multiples of 64"),
        ({"chunk_sizes": ()}, "chunk_sizes is"),
        ({"chunk_sizes": (128, 64)}, "the sizes must ascend"),
        ({"step_sizes": (1024, 512)}, "step_sizes is .*; the sizes must ascend"),
        ({"step_sizes": (63, 512)}, r"step_sizes is \[63, 512\]; it needs numbers of at least 64"),
        ({"step_sizes": ()}, "step_sizes is"),
        ({"row_sizes": (2, 4), "max_rows": 8}, r"row_sizes is \[2, 4\]; it needs .* end with max_rows \(8\)"),
        ({"row_sizes": (0, 4)}, r"row_sizes is \[0, 4\]; it needs numbers of at least 1$"),
        ({"row_sizes": ()}, r"row_sizes is \[\]; it needs numbers of at least 1$"),
        ({"row_sizes": (8, 8)}, "the sizes must ascend"),
        ({"adapter_rank_capacity": 12}, "adapter_rank_capacity is 12; it must be a positive multiple of 8"),
        ({"microbatch_tokens": 100}, "microbatch_tokens is 100; it must be a positive multiple of 64"),
        ({"backward_window": 100}, "backward_window is 100; it must be a positive multiple of 64"),
        (
            {"microbatch_tokens": 384, "backward_window": 256},
            "microbatch_tokens is 384; it must be a positive multiple of backward_window = 256",
        ),
    ],
)
def test_values_outside_their_range_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        engine(**values)


def test_paths_resolve_against_the_file(tmp_path):
    (tmp_path / "model").mkdir()
    table = {"data": "rows.jsonl", "model": "model", "label": "rows.jsonl"}
    places = from_table(Places, table, "here", tmp_path)
    assert places == Places(str(tmp_path / "rows.jsonl"), str(tmp_path / "model"), "rows.jsonl")


def test_a_hub_name_stays_a_name_and_an_absolute_path_stays_absolute(tmp_path):
    places = from_table(Places, {"data": "/rows.jsonl", "model": "owner/model"}, "here", tmp_path)
    assert places == Places("/rows.jsonl", "owner/model")
    places = from_table(Places, {"data": "d", "model": "./absent"}, "here", tmp_path)
    assert places.model == str(tmp_path / "absent")


def test_resolving_makes_a_new_value():
    config = engine(model="owner/model")
    resolved = config.resolved(2048, "cpu")
    assert (config.max_model_len, config.row_sizes) == (None, None)
    assert (resolved.max_model_len, resolved.row_sizes, resolved.served_model_name) == (2048, (2, 8), "owner/model")
    assert resolved.resolved(2048, "cpu") == resolved


def test_an_objective_chooses_the_policy():
    priced = engine(policy="price"), engine(policy="price", tpot_objective_ms=9)
    policies = {values.resolved(64, "cpu").policy for values in priced}
    assert policies == {"price"}
    assert engine().resolved(64, "cpu").policy == "flat_out"
    assert engine(tpot_objective_ms=9).resolved(64, "cpu").policy == "co_serve"
    assert engine(itl_objective_ms=9).resolved(64, "cpu").policy == "co_serve"
    assert {"flat_out", "co_serve"} <= set(POLICIES)


@pytest.mark.parametrize(
    ("objectives", "seconds"),
    [
        ({"tpot_objective_ms": 40}, (0.04, None, 5.0)),
        ({"itl_objective_ms": 50}, (0.05, 0.05, 5.0)),
        ({"tpot_objective_ms": 40, "itl_objective_ms": 50, "ttft_objective_ms": 300}, (0.04, 0.05, 0.3)),
        ({"itl_objective_ms": 50, "policy_options": {"itl": 0.06}}, (0.05, 0.06, 5.0)),
    ],
)
def test_objectives_reach_the_policy_in_seconds(objectives, seconds):
    policy = policy_of(engine(**objectives).resolved(64, "cpu"))
    assert (policy.objective, policy.itl, policy.ttft) == seconds


def test_co_serving_needs_an_objective():
    with pytest.raises(ConfigError, match="set tpot_objective_ms or itl_objective_ms"):
        policy_of(engine(policy="co_serve", ttft_objective_ms=300).resolved(64, "cpu"))


def test_a_small_engine_has_one_row_size():
    sizes = {rows: engine(max_rows=rows).resolved(64, "cpu").row_sizes for rows in (3, 8, 36, 64)}
    assert sizes == {3: (3,), 8: (2, 8), 36: (16, 36), 64: (16, 64)}, "a quarter, from 8 on in multiples of 8"


@pytest.mark.parametrize(
    ("platform", "given", "sizes"),
    [
        ("cpu", {}, (8, (2, 8), (64, 256), None, 512, 256)),
        ("gpu", {}, (256, (32, 64, 128, 256), None, (384, 640, 1024, 1280, 2048), 4096, 2048)),
        ("gpu", {"max_rows": 48}, (48, (48,), None, (384, 640, 1024, 1280, 2048), 4096, 2048)),
        ("gpu", {"max_rows": 500}, (500, (64, 128, 256, 500), None, (384, 640, 1024, 1280, 2048), 4096, 2048)),
        ("gpu", {"row_sizes": (16, 96), "chunk_sizes": (512,)}, (96, (16, 96), (512,), None, 4096, 2048)),
        ("gpu", {"step_sizes": (1024,)}, (256, (32, 64, 128, 256), None, (1024,), 4096, 2048)),
        ("cpu", {"microbatch_tokens": 384}, (8, (2, 8), (64, 256), None, 384, 192)),
        ("cpu", {"backward_window": 320}, (8, (2, 8), (64, 256), None, 640, 320)),
        ("gpu", {"policy": "finetune_only"}, (8, (8,), (4096,), None, 4096, 2048)),
        ("gpu", {"policy": "finetune_only", "microbatch_tokens": 6144}, (8, (8,), (3072,), None, 6144, 2048)),
        ("cpu", {"policy": "finetune_only"}, (8, (8,), (512,), None, 512, 256)),
        ("gpu", {"policy": "finetune_only", "step_sizes": (512,)}, (8, (8,), None, (512,), 4096, 2048)),
    ],
)
def test_sizes_left_out_suit_the_device(platform, given, sizes):
    names = ("max_rows", "row_sizes", "chunk_sizes", "step_sizes", "microbatch_tokens", "backward_window")
    resolved = engine(**given).resolved(8192, platform)
    assert tuple(getattr(resolved, name) for name in names) == sizes
    assert resolved.resolved(8192, "gpu") == resolved.resolved(8192, "cpu") == resolved, "nothing is left to decide"


def test_a_length_beyond_the_model_is_refused():
    with pytest.raises(ConfigError, match="max_model_len is 4096; the model's context ends at 2048 tokens"):
        engine(max_model_len=4096).resolved(2048, "cpu")
