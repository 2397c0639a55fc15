"""Finetune an adapter while the same engine answers a prompt, again and again, with the Python API.

    python scripts/finetune_while_serving.py MODEL DATA.jsonl "What is the capital of Peru?" [--output DIR]

Expected: answers of the base model while the job trains, with its progress beside them; then the new adapter's answer.
"""

import argparse

from flexjax import Engine, EngineConfig, FinetuneJob, SamplingParams


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="directory, .gguf file or hub name")
    parser.add_argument("data", help="JSONL file of rows to train on")
    parser.add_argument("prompt")
    parser.add_argument("--output", metavar="DIR", default="runs/adapters/mine", help="where the adapter goes")
    arguments = parser.parse_args()
    sampling = SamplingParams(temperature=0.0, max_tokens=32)
    with Engine.from_config(EngineConfig(model=arguments.model, dtype="float32")) as engine:
        job = engine.finetune(FinetuneJob("mine", arguments.data, learning_rate=1e-3, max_steps=40))
        while job.status in ("queued", "running"):
            answer = engine.generate([arguments.prompt], sampling)[0].text
            loss = f"{job.losses[-1]:.3f}" if job.losses else "-"
            print(f"step {len(job.losses)} of {job.total_steps}, loss {loss}: {answer!r}")
        if job.status != "succeeded":
            raise SystemExit(f"error: {job.error}")
        print(f"with the adapter: {engine.generate([arguments.prompt], sampling, adapter='mine')[0].text!r}")
        engine.export_adapter("mine", arguments.output)


if __name__ == "__main__":
    main()
