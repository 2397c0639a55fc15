"""PEFT adapter directories: ``adapter_config.json`` + ``adapter_model.safetensors``, read and written exactly."""

import json
from pathlib import Path

import numpy as np

from flexjax.models.config import ModelConfig
from flexjax.models.lora import module_widths
from flexjax.weights.adapter import LoraAdapter, LoraTerm, stack_terms
from flexjax.weights.checking import check_names
from flexjax.weights.peft_config import config_for, full_name, terms_of
from flexjax.weights.safetensors_files import SafetensorsFiles
from flexjax.weights.whole_files import write_json, write_tensors

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"


def tensor_name(layer: int, module: str, factor: str) -> str:
    """Name of A (factor "A") or B in PEFT files, where they are [r, in] and [out, r]."""
    return f"base_model.model.{full_name(layer, module)}.lora_{factor}.weight"


def read_adapter(directory: str | Path, config: ModelConfig) -> LoraAdapter:
    """An adapter as PEFT saved it.

    Args:
        config: the base model it is to be used with.

    Raises:
        FileNotFoundError: one of the two files is absent.
        ValueError: the configuration is refused (`flexjax.weights.peft_config`), a file is truncated, tensors are
            missing, unexpected or of another shape (all in one message), or a tensor is not finite.
    """
    directory = Path(directory)
    outline = read_outline(directory, config)
    terms, trained_on = outline.terms, outline.base_model_name
    files = SafetensorsFiles([weights_file(directory)])
    title = f"the adapter in {directory}, trained on {trained_on!r}, does not fit the model or its {CONFIG_FILE}"
    check_names(title, expected_shapes(terms, config), files.shapes)
    pairs = {
        (module, layer): tuple(read_factor(files, tensor_name(layer, module, factor)) for factor in "AB")
        for module, layers in terms.items()
        for layer, term in enumerate(layers)
        if term is not None
    }
    return stack_terms(
        config,
        pairs,
        terms,
        use_rslora=outline.use_rslora,
        dropout=outline.dropout,
        base_model_name=trained_on,
        peft_config=outline.peft_config,
    )


def read_outline(directory: str | Path, config: ModelConfig) -> LoraAdapter:
    """What an adapter's configuration says of it: the adapter without its weights.

    Raises:
        FileNotFoundError, ValueError: as `read_adapter`, of the configuration.
    """
    directory = Path(directory)
    values = read_config(directory)
    try:
        terms = terms_of(values, config)
    except ValueError as error:
        raise ValueError(f"{directory / CONFIG_FILE}: {error}") from error
    return LoraAdapter(
        {},
        terms,
        use_rslora=bool(values.get("use_rslora")),
        dropout=float(values.get("lora_dropout") or 0.0),
        base_model_name=values.get("base_model_name_or_path"),
        peft_config=values,
    )


def read_config(directory: Path) -> dict:
    file = directory / CONFIG_FILE
    if not file.is_file():
        raise FileNotFoundError(f"no {CONFIG_FILE} in {directory}: it must be a directory that PEFT saved")
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{file} holds a {type(values).__name__}; it must hold a JSON object")
    return values


def weights_file(directory: Path) -> Path:
    file = directory / WEIGHTS_FILE
    if not file.is_file():
        pickled = "; adapter_model.bin is there, but pickled torch weights are not read"
        raise FileNotFoundError(
            f"no {WEIGHTS_FILE} in {directory}{pickled if (directory / 'adapter_model.bin').is_file() else ''}"
        )
    return file


def expected_shapes(terms: dict[str, tuple[LoraTerm | None, ...]], config: ModelConfig) -> dict[str, tuple[int, int]]:
    widths = module_widths(config)
    shapes = {}
    for module, layers in terms.items():
        inputs, outputs = widths[module]
        for layer, term in enumerate(layers):
            if term is not None:
                shapes[tensor_name(layer, module, "A")] = (term.rank, inputs)
                shapes[tensor_name(layer, module, "B")] = (outputs, term.rank)
    return shapes


def read_factor(files: SafetensorsFiles, name: str) -> np.ndarray:
    """A tensor transposed to [in, r] or [r, out], float32."""
    values = files.read(name).astype(np.float32)
    if not np.isfinite(values).all():
        raise ValueError(f"tensor {name} of the adapter holds NaN or infinity; it would poison every answer")
    return values.T


def write_adapter(directory: str | Path, adapter: LoraAdapter) -> None:
    """Writes an adapter as PEFT would, in float32; one that was read and not changed is written as it was."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for module, layers in adapter.terms.items():
        for layer, term in enumerate(layers):
            if term is not None:
                a, b = adapter.unfolded(module, layer)
                tensors[tensor_name(layer, module, "A")], tensors[tensor_name(layer, module, "B")] = a.T, b.T
    write_tensors(directory / WEIGHTS_FILE, tensors)
    write_json(directory / CONFIG_FILE, config_for(adapter))
