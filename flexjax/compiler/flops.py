"""FLOPs of a jaxpr: its matrix products and the operations that a caller prices; elementwise work counts nothing."""

import math
from collections.abc import Callable, Mapping

from jax.extend.core import Jaxpr, JaxprEqn, Primitive, jaxprs_in_params

Prices = Mapping[Primitive, Callable[[JaxprEqn], int]]


def count_flops(jaxpr: Jaxpr, prices: Prices) -> int:
    """Floating-point operations of one call, a multiplication and an addition counting as two.

    Args:
        prices: FLOPs of an equation, by primitive, for opaque operations such as kernels.

    Raises:
        ValueError: a while loop, whose number of turns no jaxpr tells.
    """
    return sum(equation_flops(equation, prices) for equation in jaxpr.eqns)


def equation_flops(equation: JaxprEqn, prices: Prices) -> int:
    if equation.primitive in prices:
        return prices[equation.primitive](equation)
    match equation.primitive.name:
        case "dot_general":
            return product_flops(equation)
        case "while":
            raise ValueError("the FLOPs of a while loop cannot be counted; use a scan, or price it as one operation")
        case "cond":
            return max(count_flops(branch.jaxpr, prices) for branch in equation.params["branches"])
    turns = equation.params["length"] if equation.primitive.name == "scan" else 1
    return turns * sum(count_flops(inner, prices) for inner in jaxprs_in_params(equation.params))


def product_flops(equation: JaxprEqn) -> int:
    """Two per element of the result and position of the contracted axes."""
    (contracted, _), _ = equation.params["dimension_numbers"]
    left, result = equation.invars[0].aval, equation.outvars[0].aval
    return 2 * math.prod(result.shape) * math.prod(left.shape[axis] for axis in contracted)
