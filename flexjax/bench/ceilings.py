"""Ceilings: what this chip does at best with bytes and with products, measured in the run that is judged by them."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from flexjax.bench.timing import time_calls


@dataclass(frozen=True)
class CeilingSizes:
    """Bytes copied at a time (L2 caches hold 60 MB), and n of the n x n x n product."""

    copied_bytes: int
    product: int


FULL = CeilingSizes(copied_bytes=1 << 30, product=8192)
TINY = CeilingSizes(copied_bytes=1 << 20, product=64)


@dataclass(frozen=True)
class Ceilings:
    """Attributes:
    copy: bytes read and written per second by a copy in device memory.
    product: FLOPs per second of a bfloat16 product with float32 sums.
    """

    copy: float
    product: float

    def least_seconds(self, bytes: float, flops: float) -> float:
        """Time below which these bytes and FLOPs cannot be had."""
        return max(bytes / self.copy, flops / self.product)

    def bound(self, bytes: float, flops: float) -> str:
        return "copy" if bytes / self.copy >= flops / self.product else "product"


def measure_ceilings(sizes: CeilingSizes) -> Ceilings:
    return Ceilings(measure_copy(sizes.copied_bytes), measure_product(sizes.product))


def measure_copy(copied_bytes: int) -> float:
    """Bytes read and written per second: the better of a copy by the driver and one by a kernel."""
    source = jnp.ones(copied_bytes // 4, jnp.float32)
    by_driver = lambda state, source, index: (state, source.copy())
    by_kernel = lambda state, source, index: (state, -source)
    best = min(time_calls(copy, 1, (), source).best for copy in (by_driver, by_kernel))
    return 2 * source.nbytes / best


def measure_product(n: int, calls: int = 4) -> float:
    """FLOPs per second of x w, each call with the result of the one before; values keep their size."""
    x, w = (jax.random.normal(jax.random.key(seed), (n, n), jnp.bfloat16) for seed in range(2))
    w *= jnp.bfloat16(n**-0.5)
    multiply = lambda x, w, index: (x @ w, ())
    return 2 * n**3 / time_calls(multiply, calls, x, w).best
