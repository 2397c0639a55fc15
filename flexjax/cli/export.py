"""Write an adapter directory in PEFT's format again, checked against its model; or, with --merge, the model's weights
with the adapter added, as a Hugging Face directory."""

import argparse
import json
import shutil
from pathlib import Path

from flexjax.cli.progress import show
from flexjax.fields import ConfigError
from flexjax.models.build import dtype_of
from flexjax.weights.adapter import LoraAdapter
from flexjax.weights.huggingface import save_directory
from flexjax.weights.merge import merge
from flexjax.weights.peft import read_adapter, write_adapter
from flexjax.weights.source import ModelSource, open_model

COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)
"""Files that go along with merged weights, where the model has them."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, metavar="PATH", help="model directory, .gguf file or hub name")
    parser.add_argument("--revision", metavar="NAME", help="of a hub name")
    parser.add_argument("--adapter", required=True, type=Path, metavar="DIR", help="PEFT adapter of that model")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="directory to write")
    parser.add_argument("--merge", action="store_true", help="write the model's weights with the adapter added")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of merged weights; default: the model's own")


def run(arguments: argparse.Namespace) -> int:
    source = open_model(arguments.model, arguments.revision)
    output = arguments.output.resolve()
    if output in (source.path.resolve(), arguments.adapter.resolve()):
        raise ConfigError(f"--output is {arguments.output}, which is an input too; choose another")
    adapter = read_adapter(arguments.adapter, source.config)
    if arguments.merge:
        write_merged(source, adapter, arguments.output, arguments.dtype or own_dtype(source))
    else:
        write_adapter(arguments.output, adapter)
        show(f"adapter written to {arguments.output}")
    return 0


def write_merged(source: ModelSource, adapter: LoraAdapter, output: Path, dtype: str) -> None:
    weights = source.load_weights(dtype_of(dtype))
    save_directory(output, source.config, merge(weights, adapter, source.config))
    present = [name for name in COMPANIONS if source.path.is_dir() and (source.path / name).is_file()]
    for name in present:
        shutil.copyfile(source.path / name, output / name)
    show(f"merged weights ({dtype}) written to {output}, with {', '.join(present) or 'no tokenizer files'}")


def own_dtype(source: ModelSource) -> str:
    """bfloat16 for a model that is stored so; any other is held exactly by float32."""
    file = source.path / "config.json"
    values = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    stored = values.get("dtype") or values.get("torch_dtype")
    return "bfloat16" if stored == "bfloat16" else "float32"
