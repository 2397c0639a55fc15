"""The compiled form: what is donated is updated in place, temporaries do not grow with the pool, programs are few."""

import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from flexjax.engine.programs import JobShape, Programs
from flexjax.engine.specs import factor_specs, master_specs, weight_specs
from flexjax.finetuning.packing import pack_group
from flexjax.models.build import abstract_decoder, dotted
from flexjax.state import adapter_shapes, gradient_shapes, nbytes, pool_shape, row_shapes, stack_shapes
from flexjax.steps.update import OptimizerSpec, new_master
from tests.ladder import (
    DECODE,
    LEAN,
    LLAMA,
    MICROBATCH,
    PAGES,
    QWEN,
    TAPED,
    WIDE,
    WINDOW,
    Model,
    Rig,
    compiled,
    example,
)

JOB, SPEC = JobShape(rank=8), OptimizerSpec(max_grad_norm=None)
"""Those of the rig's jobs of rank 4, so that programs are shared with other tests."""


def programs_of(pages: int) -> Programs:
    """With the leanest tape, whose write depends on attention the least."""
    return compiled(Model.random(LLAMA), LEAN, WINDOW, pages, jnp.float32, 1)[0]


def written(dims) -> dict[str, int]:
    """Bytes of what each program gives back changed, which it must not hold twice."""
    factors = adapter_shapes(dims, JOB.rank, JOB.modules, jnp.float32)
    master = nbytes(jax.eval_shape(lambda f: new_master(SPEC, f), factors))
    gradients, stack = nbytes(gradient_shapes(dims, JOB.rank, JOB.modules)), nbytes(stack_shapes(dims))
    forward = nbytes(pool_shape(dims)) + nbytes(row_shapes(dims))
    return dict(decode=forward, taped=forward, loss=gradients, backward=gradients, publish=stack) | {
        "update": master + gradients + stack
    }


COMPILE = {
    "decode": lambda programs: programs.forward(DECODE),
    "taped": lambda programs: programs.forward(TAPED),
    "loss": lambda programs: programs.loss(JOB),
    "backward": lambda programs: programs.backward(JOB),
    "update": lambda programs: programs.update(JOB, SPEC),
    "publish": lambda programs: programs.publish(JOB),
}


@pytest.mark.parametrize("name", COMPILE)
def test_donated_buffers_are_written_in_place(name):
    programs = programs_of(PAGES)
    memory = COMPILE[name](programs).memory
    assert memory.alias_size_in_bytes == written(programs.dims)[name]


@pytest.mark.parametrize("name", ["taped", "loss", "backward"])
def test_temporaries_do_not_grow_with_the_pool(name):
    """With a pool five times as large, a single copy of it would show, as one does where a write of the tape is not
    ordered against attention's reads."""
    small, large = (COMPILE[name](programs_of(pages)).memory.temp_size_in_bytes for pages in (PAGES, 5 * PAGES))
    assert large == small


@pytest.mark.parametrize("name", COMPILE)
def test_no_program_talks_to_the_host(name):
    text = COMPILE[name](programs_of(PAGES)).call.as_text()
    assert re.findall("callback|infeed|outfeed|send-done|recv-done", text) == []


def test_one_backward_program_for_all_layers_and_windows():
    rig = Rig(Model.random(LLAMA), window=64, tape=WIDE)
    rig.begin(rig.model.factors(4, seed=7), 1.5)
    group = [example(rig.model.tokens(length, seed=length)) for length in (180, 66)]
    rig.hold(0, *pack_group(group, MICROBATCH, 0, 0))
    rig.train(0)
    keys = [key for key in rig.programs.compiled if key[0] in ("loss", "backward") and key[1] == rig.job]
    assert sorted(key[0] for key in keys) == ["backward", "loss"]


def test_a_program_is_compiled_once():
    programs = programs_of(PAGES)
    for compile_program in COMPILE.values():
        assert compile_program(programs) is compile_program(programs)


def test_publishing_does_not_depend_on_how_a_job_is_trained():
    """An adapter with dropout and one without, of one shape, share the program."""
    programs = programs_of(PAGES)
    assert programs.publish(JOB) is programs.publish(JobShape(JOB.rank, JOB.modules, dropout=True))


def test_weights_are_cut_by_name():
    """Matrices are [out, in]: column-parallel products by their output, row-parallel ones by their input, everything
    else whole."""
    _, shapes = abstract_decoder(QWEN, jnp.float32, tp=2)
    leaves = jax.tree_util.tree_leaves_with_path(weight_specs(shapes), is_leaf=lambda x: isinstance(x, P))
    assert {dotted(path).split(".")[-1]: spec for path, spec in leaves} == {
        **dict(embed=P(), norm=P(), input_norm=P(), post_norm=P()),
        **dict(qkv=P(None, "tp", None), qkv_bias=P(None, "tp"), gate_up=P(None, "tp", None)),
        **dict(o=P(None, None, "tp"), down=P(None, None, "tp")),
    }


@pytest.mark.parametrize("name", ["adamw", "lion", "adafactor"])
def test_moments_are_cut_as_their_factors(name):
    dims = programs_of(PAGES).dims
    factors = adapter_shapes(dims, 8, ("q_proj", "o_proj"), jnp.float32)
    master = jax.eval_shape(lambda f: new_master(OptimizerSpec(name), f), factors)
    specs = master_specs(master, ("q_proj", "o_proj"))
    is_spec = lambda x: isinstance(x, P)
    shapes, cut = jax.tree.leaves(master.optimizer), jax.tree.leaves(specs.optimizer, is_leaf=is_spec)
    factor_cuts = factor_specs(("q_proj", "o_proj"))
    by_shape = {factors[f][m].shape: spec for f, modules in factor_cuts.items() for m, spec in modules.items()}
    assert len(shapes) == len(cut)
    assert cut == [by_shape.get(shape.shape, P()) for shape in shapes]
