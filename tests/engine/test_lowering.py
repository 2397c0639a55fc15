"""Programs that another process has lowered: the same results, and nothing lost where that process fails."""

import io
import pickle
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from flexjax.engine import lowering
from flexjax.engine.lowering import LoweringProcesses
from flexjax.engine.programs import Programs
from flexjax.models.build import abstract_decoder
from flexjax.steps.kernels import Kernels
from tests.engine.test_program_store import DIMS, TABLE, programs_in, random_arguments
from tests.ladder import DECODE, LLAMA, TAPED


@pytest.fixture(scope="module")
def processes():
    with LoweringProcesses("cpu", 1) as those:
        yield those


def programs_with(processes: LoweringProcesses, folder=None) -> Programs:
    definition, weights = abstract_decoder(LLAMA, DIMS.dtype, 1)
    mesh = Mesh(np.array(jax.devices()[:1]), ("tp",))
    return Programs(definition, weights, DIMS, Kernels(), mesh, folder, processes)


@pytest.fixture
def sent(monkeypatch) -> list:
    """Keys of programs that came from a process."""
    keys, plain = [], lowering.LoweringProcess.lowered

    def lowered(process, order):
        answer = plain(process, order)
        keys.append(order.key)
        return answer

    monkeypatch.setattr(lowering.LoweringProcess, "lowered", lowered)
    return keys


@pytest.mark.parametrize("name", [name for name in TABLE if name != "sample"])
def test_a_program_lowered_elsewhere_computes_the_same_to_the_bit_in_the_same_memory(name, processes, sent, tmp_path):
    elsewhere, here = programs_with(processes), programs_in(tmp_path)
    made, expected = TABLE[name](elsewhere), TABLE[name](here)
    assert len(sent) == 1 and made.memory == expected.memory
    results = [program(*random_arguments(expected.call, seed=5)) for program in (made, expected)]
    assert jax.tree.structure(results[0]) == jax.tree.structure(results[1])
    for got, wanted in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_array_equal(np.asarray(got), np.asarray(wanted))


def test_what_is_donated_is_donated(processes, sent):
    program = programs_with(processes).forward(TAPED)
    arguments = random_arguments(program.call, seed=0)
    program(*arguments)
    weights, _, pool, rows, _ = arguments
    assert sent and all(leaf.is_deleted() for leaf in jax.tree.leaves((pool, rows)))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(weights))


def test_a_run_that_lowers_elsewhere_and_one_that_does_not_find_each_others_programs(processes, sent, tmp_path):
    programs_with(processes, tmp_path).forward(TAPED)
    assert sent and programs_in(tmp_path).forward(TAPED).stored


def test_programs_without_kernels_are_lowered_here(processes, sent):
    TABLE["sample"](programs_with(processes))
    assert not sent


def lowered_after(sent, breaking):
    """The second program of a run whose process was broken after the first."""
    with LoweringProcesses("cpu", 1) as processes:
        programs = programs_with(processes)
        programs.forward(DECODE)
        sent.clear()
        (process,) = processes._processes
        breaking(process)
        return programs.forward(TAPED)


def test_a_process_that_ended_says_so_and_the_program_is_lowered_here(sent, caplog):
    def killed(process):
        process._process.kill()
        process._process.wait()

    program = lowered_after(sent, killed)
    assert program(*random_arguments(program.call, seed=0))
    assert not sent and "forward is lowered in this process: the process for it ended with -9" in caplog.text


def test_half_an_answer_is_no_answer(sent, caplog):
    def interrupted(process):
        process._process.stdout.close()
        process._process.stdout = io.BytesIO(pickle.dumps(b"half of this arrives")[:-8])

    lowered_after(sent, interrupted)
    assert not sent and "forward is lowered in this process" in caplog.text


def test_where_no_process_can_be_started_programs_are_lowered_here(sent, caplog, monkeypatch):
    monkeypatch.setattr(lowering.subprocess, "Popen", lambda *_, **__: (_ for _ in ()).throw(OSError("no memory")))
    with LoweringProcesses("cpu", 2) as processes:
        programs = programs_with(processes)
        programs.forward(DECODE), programs.forward(TAPED)
    assert not sent and caplog.text.count("programs are lowered by 0 processes: no memory") == 1


def test_a_process_that_cannot_lower_says_why_and_goes_on(processes, sent, caplog, monkeypatch):
    programs = programs_with(processes)
    with monkeypatch.context() as patch:
        patch.setattr(lowering, "jax_settings", lambda: {"jax_numpy_rank_promotion": "raise"})
        programs.forward(TAPED)
    assert not sent and "forward is lowered in this process: ValueError: " in caplog.text
    programs_with(processes).forward(TAPED)
    assert sent == [("forward", TAPED)]


def test_settings_of_jax_are_those_of_who_asks(processes, sent):
    """With strict ranks a program that adds a vector to a matrix is refused."""
    programs = programs_with(processes)
    before = jax.config.jax_numpy_rank_promotion
    jax.config.update("jax_numpy_rank_promotion", "raise")
    try:
        with pytest.raises(ValueError, match="rank_promotion"):
            programs.forward(TAPED)
    finally:
        jax.config.update("jax_numpy_rank_promotion", before)
    assert not sent


def test_processes_end_when_nobody_is_in_need_of_them_and_start_again(sent):
    processes = LoweringProcesses("cpu", 1)
    programs = programs_with(processes)
    with processes, processes:
        programs.forward(DECODE)
        (first,) = processes._processes
    assert len(sent) == 1 and first._process.returncode is not None
    programs.forward(TAPED)
    assert len(sent) == 1  # lowered here
    with processes:
        TABLE["loss"](programs)
    assert len(sent) == 2


def test_many_threads_share_the_processes(sent):
    with LoweringProcesses("cpu", 2) as processes, ThreadPoolExecutor(5) as threads:
        programs = programs_with(processes)
        names = [name for name in TABLE if name != "sample"]
        list(threads.map(lambda name: TABLE[name](programs), names))
        assert len(processes._processes) == 2
    assert {key[0].removeprefix("_") for key in sent} == {"forward", "loss", "backward", "update", "publish"}
