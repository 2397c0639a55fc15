"""Serve a list of prompts with the Python API.

    python scripts/serve_prompts.py MODEL "Once upon a time" "The lighthouse" [--adapter DIR]

Expected: each prompt with its continuation, all computed in one batch.
"""

import argparse

from flexjax import Engine, EngineConfig, SamplingParams


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="directory, .gguf file or hub name")
    parser.add_argument("prompts", nargs="+")
    parser.add_argument("--adapter", metavar="DIR", help="PEFT adapter to answer with")
    arguments = parser.parse_args()
    config = EngineConfig(model=arguments.model, dtype="float32")
    with Engine.from_config(config) as engine:
        if arguments.adapter:
            engine.load_adapter("adapter", arguments.adapter)
        sampling = SamplingParams(temperature=0.0, max_tokens=64)
        name = "adapter" if arguments.adapter else None
        for prompt, output in zip(arguments.prompts, engine.generate(arguments.prompts, sampling, name), strict=True):
            print(f"{prompt}|{output.text}\n")


if __name__ == "__main__":
    main()
