"""ProgramStore: compiled programs on the disk. A later run that would compile the same neither traces nor lowers it,
which is Python's work and most of a start, even where the compiler itself keeps what it has compiled.

A program is found by all that decides what it computes: its name and arguments, every size, the source of what makes
programs, of the kernels too, versions, device and settings of jax. Who can write into the folder can have programs run
here.

jax's own cache is not used beside it: what it has loaded cannot be written down again on a CPU.

On a GPU what the compiler has measured is kept too: a program that no run has compiled yet mostly has products that
others have, and measuring takes memory that an engine which runs has little of.
"""

import hashlib
import io
import logging
import os
import pickle
import platform
import tempfile
import time
from collections.abc import Iterable
from functools import cache
from importlib.metadata import version
from pathlib import Path

import jax
from jax.experimental.serialize_executable import deserialize_and_load, serialize
from jax.sharding import Mesh

import pallas_kernels
from flexjax.engine.blueprint import Blueprint, Compiled
from flexjax.engine.jax_settings import jax_settings

logger = logging.getLogger(__name__)

SETTING_VARIABLES = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "TF_", "NVIDIA_TF32_OVERRIDE", "MOSAIC_", "CUDA_ROOT")
"""Beginnings of environment variables that change what is compiled and are not among jax's settings."""

SUFFIX = ".program"

MEASURED = "xla_gpu_per_fusion_autotune_cache_dir"
"""Option of the compiler: a folder that is there, for the fastest way it has found to compute each product."""

PACKAGE = Path(__file__).parents[1]

SOURCES = (
    *("layout.py", "request.py", "state.py", "step_batch.py", "models", "steps"),
    *(f"engine/{name}.py" for name in ("blueprint", "jax_settings", "layer_views", "lowering", "lowering_process")),
    *(f"engine/{name}.py" for name in ("program_store", "programs", "specs")),
)
"""Files and folders of this package that make programs: `flexjax.engine.programs` and all that it imports. Another
server, scheduler or job leaves the programs that are kept as good as they were."""


class ProgramStore:
    """Any thread, and any number of processes, may use the same folder.

    Args:
        folder: made when the first program is kept.
        mesh: devices that programs run on.
    """

    def __init__(self, folder: Path, mesh: Mesh):
        self._folder, self._devices = folder, list(mesh.devices.flat)
        placed = [(device.id, device.device_kind) for device in self._devices]
        self._machine = self._devices[0].client.platform_version, mesh.axis_names, mesh.devices.shape, placed

    def measured(self) -> dict[str, str]:
        """Options of the compiler with which it reads what was measured on such a machine before, and adds to it."""
        if self._devices[0].platform != "gpu":
            return {}
        decides = surroundings()[1:], self._machine[0], self._devices[0].device_kind
        folder = self._folder / f"measured-{digest(decides)}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            logger.warning("what the compiler measures is not kept for later runs: %s", error)
            return {}
        return {MEASURED: str(folder)}

    def load(self, name: tuple, blueprint: Blueprint, settings: tuple) -> Compiled | None:
        """A program that an earlier run has kept; None if there is none that can be used.

        Args:
            name: of the program, and its arguments.
            settings: all else that decides what it computes. It and ``name`` are compared by their ``repr``.
        """
        started, file = time.perf_counter(), self._file(name, blueprint, settings)
        try:
            payload = checked(file.read_bytes())
            program, out, memory = pickle.loads(payload)
            in_tree, out_tree = jax.tree.structure((blueprint.shapes, {})), jax.tree.structure(out)
            call = deserialize_and_load(program, in_tree, out_tree, execution_devices=self._devices)
        except FileNotFoundError:
            return None
        except Exception as error:  # whatever is wrong with the file, the program can be compiled
            logger.warning("%s cannot be used and is made anew: %s", file, error)
            return None
        return Compiled(call, time.perf_counter() - started, memory, stored=True)

    def keep(self, name: tuple, blueprint: Blueprint, settings: tuple, program: Compiled) -> None:
        """Have later runs find it. Where that cannot be, a warning says why."""
        try:
            serialized, _, out_tree = serialize(program.call)
            out = out_tree.unflatten(range(out_tree.num_leaves))
            write(self._file(name, blueprint, settings), pickle.dumps((serialized, out, program.memory)))
        except Exception as error:  # a full disk, or something in it that cannot be written down
            logger.warning("the program %s is not kept for later runs: %s", name, error)

    def _file(self, name: tuple, blueprint: Blueprint, settings: tuple) -> Path:
        leaves = [(leaf.shape, str(leaf.dtype)) for leaf in jax.tree.leaves(blueprint.shapes)]
        specs = str((blueprint.specs, blueprint.out_specs, blueprint.donated, blueprint.partitioned))
        decides = surroundings(), self._machine, settings, name, leaves, specs
        return self._folder / f"{name[0]}-{digest(decides)}{SUFFIX}"


def digest(value) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()


def checked(content: bytes) -> bytes:
    """Raises ValueError unless the content is what `write` has written."""
    digest, payload = content[:32], content[32:]
    if hashlib.sha256(payload).digest() != digest:
        raise ValueError("its checksum is wrong")
    return payload


def write(file: Path, payload: bytes) -> None:
    """Whole or not at all, with a checksum in front."""
    file.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=file.parent)
    try:
        with io.FileIO(descriptor, "w") as stream:
            stream.write(hashlib.sha256(payload).digest() + payload)
        os.replace(temporary, file)
    except BaseException:
        os.unlink(temporary)
        raise


@cache
def surroundings() -> tuple:
    """What decides a program beside its own sizes and devices."""
    versions = [f"{package} {version(package)}" for package in ("jax", "jaxlib", "flax", "optax")]
    variables = {name: value for name, value in os.environ.items() if name.startswith(SETTING_VARIABLES)}
    source = digest_of_source(PACKAGE, SOURCES), digest_of_source(Path(pallas_kernels.__file__).parent)
    machine = platform.python_version(), platform.machine()
    return source, *machine, versions, sorted(jax_settings().items()), sorted(variables.items())


def digest_of_source(folder: Path, places: Iterable[str] = (".",)) -> str:
    """Of the Python files in these places of a folder, each a file or a folder with all below it, and of where they
    are."""
    total = hashlib.sha256()
    for place in places:
        found = folder / place
        for file in [found] if found.suffix == ".py" else sorted(found.rglob("*.py")):
            content = file.read_bytes()
            total.update(f"{file.relative_to(folder)} {len(content)}\n".encode() + content)
    return total.hexdigest()
