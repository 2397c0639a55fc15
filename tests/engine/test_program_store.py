"""Programs that an earlier run has left: the same results, without tracing, and never another program's."""

import os
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import grimp
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from flexjax.engine import program_store, programs
from flexjax.engine.program_store import SUFFIX, digest_of_source
from flexjax.engine.programs import JobShape, Programs
from flexjax.models.build import abstract_decoder
from flexjax.request import SamplingLevel
from flexjax.state import Dimensions
from flexjax.steps.kernels import Kernels
from flexjax.steps.update import OptimizerSpec
from tests.ladder import DECODE, LLAMA, TAPED

DIMS = Dimensions(
    model=LLAMA,
    dtype=jnp.float32,
    max_rows=4,
    context=128,
    pages=20,
    rank_capacity=8,
    adapters=2,
    microbatch=384,
    window=128,
    tape=("x",),
)
JOB = JobShape(rank=8)
TABLE = {
    "decode": lambda those: those.forward(DECODE),
    "taped": lambda those: those.forward(TAPED),
    "sample": lambda those: those.sample(4, SamplingLevel.GREEDY, True),
    "loss": lambda those: those.loss(JOB),
    "backward": lambda those: those.backward(JOB),
    "update": lambda those: those.update(JOB, OptimizerSpec()),
    "publish": lambda those: those.publish(JOB),
}
COMPUTES = ("forward", "sample_rows", "loss_window", "backward_window", "update", "publish")
"""What programs are traced from."""


def programs_in(folder: Path, dims: Dimensions = DIMS, kernels: Kernels | None = None) -> Programs:
    definition, weights = abstract_decoder(LLAMA, dims.dtype, dims.tp)
    mesh = Mesh(np.array(jax.devices()[: dims.tp]), ("tp",))
    return Programs(definition, weights, dims, kernels or Kernels(), mesh, folder)


def random_arguments(call, seed: int) -> list:
    """As the program takes them; whole numbers stay small, so that they are pages and rows that there are."""
    draw = np.random.default_rng(seed)

    def array(info, sharding):
        whole = jnp.issubdtype(info.dtype, jnp.integer)
        values = draw.integers(0, 4, info.shape) if whole else draw.standard_normal(info.shape)
        return jax.device_put(jnp.asarray(values, info.dtype), sharding)

    arguments, _ = jax.tree.map(array, call.args_info, call.input_shardings)
    return arguments


@pytest.fixture(scope="module")
def kept(tmp_path_factory) -> tuple[Path, Programs]:
    """A folder with every program of the table in it, and those who left them there."""
    folder = tmp_path_factory.mktemp("programs")
    makers = programs_in(folder)
    for program in TABLE.values():
        assert not program(makers).stored
    return folder, makers


@pytest.mark.parametrize("name", TABLE)
def test_a_program_of_an_earlier_run_computes_the_same_to_the_bit_and_is_not_traced(name, kept, monkeypatch):
    folder, makers = kept
    for function in COMPUTES:
        monkeypatch.setattr(programs, function, lambda *_: pytest.fail("it is traced"))
    made, found = TABLE[name](makers), TABLE[name](programs_in(folder))
    assert found.stored and found.memory == made.memory
    results = [program(*random_arguments(made.call, seed=3)) for program in (made, found)]
    assert jax.tree.structure(results[0]) == jax.tree.structure(results[1])
    for expected, got in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_array_equal(np.asarray(expected), np.asarray(got))


def test_what_is_donated_is_donated(kept):
    folder, _ = kept
    program = TABLE["publish"](programs_in(folder))
    arguments = random_arguments(program.call, seed=0)
    program(*arguments)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(arguments[0]))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(arguments[1]))


def test_shards_of_an_earlier_run(tmp_path):
    dims = replace(DIMS, tp=2)
    made = TABLE["publish"](programs_in(tmp_path, dims))
    found = TABLE["publish"](programs_in(tmp_path, dims))
    assert found.stored
    results = [program(*random_arguments(made.call, seed=1)) for program in (made, found)]
    for expected, got in zip(*map(jax.tree.leaves, results), strict=True):
        assert expected.sharding == got.sharding
        np.testing.assert_array_equal(np.asarray(expected), np.asarray(got))


CHANGES = {
    "pages": lambda patch, folder: programs_in(folder, replace(DIMS, pages=21)),
    "the window": lambda patch, folder: programs_in(folder, replace(DIMS, window=64)),
    "an epsilon": lambda patch, folder: programs_in(folder, replace(DIMS, model=replace(LLAMA, rms_norm_eps=1e-6))),
    "a kernel": lambda patch, folder: programs_in(folder, kernels=Kernels(head_chunk=16)),
    "the source": lambda patch, folder: surrounded(patch, folder, lambda old: ("other", *old[1:])),
    "a setting of jax": lambda patch, folder: surrounded(patch, folder, lambda old: (*old, "jax_enable_x64")),
    "an option": lambda patch, folder: with_option(programs_in(folder)),
}


def surrounded(patch, folder, change) -> Programs:
    other = change(program_store.surroundings())
    patch.setattr(program_store, "surroundings", lambda: other)
    return programs_in(folder)


def with_option(those: Programs) -> Programs:
    those.options["xla_cpu_enable_fast_math"] = False
    return those


@pytest.mark.parametrize("change", CHANGES)
def test_what_decides_a_program_decides_which_is_found(change, kept, monkeypatch):
    folder, _ = kept
    assert not CHANGES[change](monkeypatch, folder).loss(JOB).stored


def test_other_arguments_are_other_programs(kept):
    those = programs_in(kept[0])
    assert those.sample(4, SamplingLevel.GREEDY, True).stored
    assert not those.sample(4, SamplingLevel.GREEDY, False).stored
    assert not those.loss(JobShape(rank=8, modules=("q_proj",))).stored


def damaged(content: bytes, how: str) -> bytes:
    middle = len(content) // 2
    flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    foreign = pickle.dumps(("not a program",))
    return {"torn": content[:middle], "flipped": flipped, "empty": b"", "foreign": foreign}[how]


@pytest.mark.parametrize("how", ["torn", "flipped", "empty", "foreign"])
def test_a_damaged_file_is_made_anew(how, tmp_path, caplog):
    sample = lambda: TABLE["sample"](programs_in(tmp_path))
    assert not sample().stored
    (file,) = tmp_path.glob(f"*{SUFFIX}")
    file.write_bytes(damaged(file.read_bytes(), how))
    assert not sample().stored
    assert "cannot be used and is made anew" in caplog.text
    assert sample().stored


def test_where_nothing_can_be_kept_programs_are_compiled_and_somebody_is_told(tmp_path, caplog):
    (tmp_path / "file").touch()
    assert not TABLE["sample"](programs_in(tmp_path / "file" / "programs")).stored
    assert "is not kept for later runs" in caplog.text


def test_processes_agree_on_what_a_program_is_called(tmp_path):
    """Whatever the order in which they hash strings, and whatever devices there are beside the program's."""
    names = []
    for number in ("1", "2"):
        code = f"from tests.engine.test_program_store import *; TABLE['sample'](programs_in(Path({str(tmp_path)!r})))"
        environment = os.environ | {"PYTHONHASHSEED": number, "JAX_NUM_CPU_DEVICES": number}
        subprocess.run([sys.executable, "-c", code], check=True, env=environment, cwd=Path(__file__).parents[2])
        names.append([file.name for file in tmp_path.glob(f"*{SUFFIX}")])
    assert names[0] == names[1] and len(names[0]) == 1


def test_the_source_is_every_python_file_with_its_place(tmp_path):
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / "a.py").write_text("x = 1\n")
    (tmp_path / "b.txt").write_text("1")
    digests = [digest_of_source(tmp_path)]
    (tmp_path / "b.txt").write_text("2")
    assert digest_of_source(tmp_path) == digests[0]
    (tmp_path / "part" / "a.py").write_text("x = 2\n")
    digests.append(digest_of_source(tmp_path))
    (tmp_path / "part" / "a.py").rename(tmp_path / "a.py")
    digests.append(digest_of_source(tmp_path))
    assert len(set(digests)) == 3


def test_source_beside_the_places_does_not_count(tmp_path):
    (tmp_path / "part").mkdir()
    files = [tmp_path / name for name in ("part/a.py", "b.py", "c.py")]
    digest = lambda: digest_of_source(tmp_path, ("part", "b.py"))
    for file in files:
        file.write_text("x = 1\n")
    changed = {}
    for file in files:
        before = digest()
        file.write_text("x = 2\n")
        changed[file.name] = digest() != before
    assert changed == {"a.py": True, "b.py": True, "c.py": False}
    with pytest.raises(FileNotFoundError):
        digest_of_source(tmp_path, ("d.py",))


def test_all_that_makes_programs_decides_which_is_found():
    """And nothing else of this package: every other change would have all programs compiled again."""
    graph, places = grimp.build_graph("flexjax"), [program_store.PACKAGE / place for place in program_store.SOURCES]
    makers = {"flexjax.engine.programs", "flexjax.engine.lowering_process"}
    needed = makers.union(*map(graph.find_upstream_modules, makers)) - {"flexjax"}
    counted = {file for place in places for file in [place, *place.rglob("*.py")] if file.suffix == ".py"}
    files = {program_store.PACKAGE.joinpath(*name.split(".")[1:]) for name in needed}
    assert {file.with_suffix(".py") for file in files if not file.is_dir()} == {
        file for file in counted if file.name != "__init__.py"
    }
