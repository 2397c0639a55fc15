"""Answers and log-probabilities of the engine, with and without adapters of PEFT, against transformers and PEFT."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from flexjax.request import RequestOutput, SamplingParams
from tests.parity.tiny_pair import ADAPTERS, MODELS, VOCABULARY

NEW_TOKENS = 12
LENGTHS = (1, 9, 64, 150)  # a single token, part of a page, a page, several chunks
PROMPTS = [np.random.default_rng(length).integers(0, VOCABULARY, length).tolist() for length in LENGTHS]
CASES = [None, *ADAPTERS]
SAMPLING = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True, logprobs=20, prompt_logprobs=20)
TOLERANCE = 5e-5
"""Of log-probabilities of up to about 20: sums of three layers in float32, in another order."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """MODEL/ADAPTER: what PEFT wrote."""
    return tmp_path_factory.mktemp("serving")


@pytest.fixture(scope="module")
def expected(ask_reference, models, folder) -> dict[tuple[str, str | None], dict[str, np.ndarray]]:
    """What torch answers, by model and adapter."""
    tasks = []
    for model, directory in models.items():
        for seed, (name, values) in enumerate(ADAPTERS.items()):
            written = {"model": directory, "output": folder / model / name, "settings": values, "seed": seed}
            tasks.append({"do": "write_adapter", **written})
        for name in CASES:
            adapter, output = name and folder / model / name, folder / f"{model}-{name}.npz"
            asked = {"model": directory, "adapter": adapter, "prompts": PROMPTS, "new_tokens": NEW_TOKENS}
            tasks.append({"do": "answer", **asked, "output": output})
    ask_reference(tasks)
    return {(model, name): dict(np.load(folder / f"{model}-{name}.npz")) for model in models for name in CASES}


@pytest.fixture(scope="module")
def answers(engines, expected, folder) -> Iterator[dict[tuple[str, str | None], list[RequestOutput]]]:
    """What the engines answer when requests of all adapters and of none come at once."""
    for model, engine in engines.items():
        for name in ADAPTERS:
            engine.load_adapter(name, folder / model / name)
    with ThreadPoolExecutor(len(CASES)) as pool:
        futures = {
            (model, name): pool.submit(engine.generate, PROMPTS, SAMPLING, name)
            for model, engine in engines.items()
            for name in CASES
        }
        yield {case: future.result() for case, future in futures.items()}
    for engine in engines.values():
        for name in ADAPTERS:
            engine.unload_adapter(name)


every_case = pytest.mark.parametrize(("model", "adapter"), [(model, name) for model in MODELS for name in CASES])


@every_case
def test_greedy_answers(expected, answers, model, adapter):
    for number, output in enumerate(answers[model, adapter]):
        assert output.prompt_token_ids + output.token_ids == expected[model, adapter][f"tokens_{number}"].tolist()


@every_case
def test_logprobs(expected, answers, model, adapter):
    for number, output in enumerate(answers[model, adapter]):
        tokens = output.prompt_token_ids + output.token_ids
        wanted = expected[model, adapter][f"logprobs_{number}"]
        entries = output.prompt_logprobs[1:] + output.logprobs
        assert len(entries) == len(tokens) - 1
        for entry, token, row in zip(entries, tokens[1:], wanted, strict=False):
            assert token in entry
            for each, value in entry.items():
                assert value == pytest.approx(row[each], abs=TOLERANCE)
            best = sorted(entry.values(), reverse=True)[:20]
            np.testing.assert_allclose(best, np.sort(row)[:-21:-1], atol=TOLERANCE)


@pytest.mark.parametrize("model", MODELS)
def test_every_adapter_matters(expected, model):
    """So that leaving one out, or taking another, would not go unnoticed."""
    rows = [expected[model, name]["logprobs_3"][: len(PROMPTS[3])] for name in CASES]
    gaps = [np.abs(one - other).max() for i, one in enumerate(rows) for other in rows[:i]]
    assert min(gaps) > 1000 * TOLERANCE
