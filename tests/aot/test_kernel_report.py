"""The reports show what they are read for: a kernel that is made to spill and to serialise its products is seen."""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from tests.aot.hopper import compile_for_h100
from tests.aot.kernel_report import BARRIER_BYTES, read_reports

ROWS, DEPTH, COLUMNS = 64, 64, 256
TILED = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))


def greedy(a, b, out):
    """Three accumulators of 128 registers a thread, alive at once."""

    def body(a_tile, b_tile, out_tile, loaded):
        for source, tile in ((a, a_tile), (b, b_tile)):
            plgpu.copy_gmem_to_smem(source, tile, loaded)
            plgpu.barrier_wait(loaded)

        def multiply(sums):
            plgpu.wgmma(sums, a_tile, b_tile)
            return sums[...]

        x, y, z = (pl.run_scoped(multiply, plgpu.ACC((ROWS, COLUMNS), jnp.float32)) for _ in range(3))
        out_tile[...] = (x * jnp.exp(y) + z * y + jnp.exp(x - z) * x).astype(jnp.bfloat16)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out_tile, out)
        plgpu.wait_smem_to_gmem(0)

    shapes = ((ROWS, DEPTH), (DEPTH, COLUMNS), (ROWS, COLUMNS))
    pl.run_scoped(body, *(plgpu.SMEM(shape, jnp.bfloat16, transforms=TILED) for shape in shapes), plgpu.Barrier())


def test_a_kernel_that_asks_for_too_much_is_seen(reports):
    shaped = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    kernel = plgpu.kernel(greedy, out_type=shaped(ROWS, COLUMNS), grid=(1,), grid_names=("block",))
    compile_for_h100(kernel, shaped(ROWS, DEPTH), shaped(DEPTH, COLUMNS))
    (report,) = read_reports(reports)
    assert report.name.startswith("greedy")
    assert report.registers == 255
    assert report.spilled_bytes > 0
    assert report.shared_bytes == 2 * (ROWS * DEPTH + DEPTH * COLUMNS + ROWS * COLUMNS) + BARRIER_BYTES
    assert any("serialized" in line for line in report.complaints)
