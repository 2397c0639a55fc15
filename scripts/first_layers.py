"""Cut the first layers and the first token ids out of a model, so that its real weights fit where the whole does not.

    python scripts/first_layers.py MODEL OUT [--layers 4] [--vocabulary 16384]

Expected: OUT is a Hugging Face directory in bfloat16 that flexjax and transformers open. With FLEXJAX_FIRST_LAYERS=OUT,
tests/steps/test_gpu_kernels.py compares what a GPU makes of it with float64 on the CPU.
"""

import argparse
from dataclasses import replace

import ml_dtypes

from flexjax.weights.huggingface import save_directory
from flexjax.weights.source import open_model

OF_VOCABULARY = ("embed", "head")
"""Arrays with a row for each token id."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="directory, .gguf file or hub name")
    parser.add_argument("out", metavar="OUT")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=16384)
    arguments = parser.parse_args()
    source = open_model(arguments.model)
    layers = min(arguments.layers, source.config.num_layers)
    vocabulary = min(arguments.vocabulary, source.config.vocab_size)
    config = replace(source.config, num_layers=layers, vocab_size=vocabulary, eos_token_ids=())
    tree = source.load_weights(ml_dtypes.bfloat16)
    cut = {name: array[:vocabulary] if name in OF_VOCABULARY else array for name, array in tree.items()}
    cut = {name: array[:layers] if name.startswith("layers.") else array for name, array in cut.items()}
    save_directory(arguments.out, config, cut)
    print(f"{arguments.out}: {layers} layers, {vocabulary} token ids, {sum(a.nbytes for a in cut.values()):,} bytes")


if __name__ == "__main__":
    main()
