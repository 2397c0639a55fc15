"""A process that lowers programs for another, see `flexjax.engine.lowering`. It touches no accelerator.

    python -m flexjax.engine.lowering_process < orders > answers
"""

import os
import pickle
import sys

import jax
import numpy as np
from jax.sharding import Mesh

from flexjax.engine.blueprint import Lowered
from flexjax.engine.lowering import Order
from flexjax.engine.programs import Programs
from flexjax.models.sharding import TP_AXIS
from pallas_kernels.paged_attention.tiling import suppose_multiprocessors


def main() -> None:
    """Answer orders until they end. What is printed meanwhile goes to standard error."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    while True:
        try:
            order = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        answers.write(answer_to(order))
        answers.flush()


def answer_to(order: Order) -> bytes:
    """A pickled `Lowered`, or a text that says why not."""
    try:
        return pickle.dumps(lower(order))
    except Exception as error:  # whatever it is, who asked meets it too and can say more
        return pickle.dumps(f"{type(error).__name__}: {error}")


def lower(order: Order) -> Lowered:
    for name, value in order.settings.items():
        if jax.config.values[name] != value:
            jax.config.update(name, value)
    suppose_multiprocessors(order.multiprocessors)
    mesh = Mesh(np.array(jax.devices()[:1]), (TP_AXIS,))
    programs = Programs(order.definition, order.frozen, order.dims, order.kernels, mesh)
    return programs.blueprint(order.key).lowered(order.dims.dtype, order.platform)


if __name__ == "__main__":
    main()
