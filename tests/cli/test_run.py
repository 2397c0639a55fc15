"""``flexjax run``: lines in, lines out, beside a job; and Ctrl-C in the middle."""

import io
import json
import signal
import subprocess
import sys
from collections import defaultdict
from types import SimpleNamespace

from flexjax.cli import main
from flexjax.weights.peft import read_adapter
from tests.cli.conftest import write_config
from tests.cli.test_finetune import start
from tests.cli.test_generate import dense_continuation, encode
from tests.tiny_model import CONFIG

GREEDY = {"temperature": 0, "max_tokens": 10, "ignore_eos": True}
PROMPTS = ["1 and 2 make", "3 and 3 make"]
LINES = [
    json.dumps({"id": "base", "prompt": PROMPTS[0], **GREEDY}),
    json.dumps({"id": 2, "model": "counter", "prompt": PROMPTS, "n": 2, "stream": True, **GREEDY}),
    "nonsense",
    json.dumps({"id": "ghost", "model": "ghost", "prompt": "a", **GREEDY}),
    json.dumps({"id": "tools", "prompt": "a", "tools": [{"type": "function"}]}),
    json.dumps({"id": "long", "prompt": [5] * 256}),
    json.dumps({"id": "chat", "model": "tiny", "messages": [{"role": "user", "content": "hi"}], **GREEDY}),
]


def joined(lines: list[dict]) -> dict:
    """(id, index) -> all its token ids, its text and its finish reasons."""
    answers = defaultdict(lambda: ([], "", []))
    for line in lines:
        ids, text, reasons = answers[line["id"], line["index"]]
        answers[line["id"], line["index"]] = (
            ids + line["token_ids"],
            text + line["text"],
            [*reasons, line["finish_reason"]],
        )
    return dict(answers)


def test_good_and_bad_lines_an_adapter_and_an_interrupt(work, adapter):
    words = ["run", str(work / "server.toml"), "--adapter", f"counter={adapter}"]
    lines, ends = [], 0
    with start(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        send(process, *LINES)
        while ends < 6:
            lines.append(json.loads(process.stdout.readline()))
            ends += lines[-1].get("finish_reason") is not None
        send(process, json.dumps({"id": "endless", "prompt": "a", "max_tokens": 200, "ignore_eos": True}))
        assert json.loads(process.stdout.readline())["id"] == "endless"
        process.send_signal(signal.SIGINT)
        rest = [json.loads(line) for line in process.stdout]
    assert process.returncode == 130
    assert rest[-1]["id"] == "endless" and rest[-1]["finish_reason"] == "abort"
    check_answers(work, lines, read_adapter(adapter, CONFIG))


def send(process, *lines: str) -> None:
    process.stdin.write("\n".join(lines) + "\n")
    process.stdin.flush()


def check_answers(work, lines, adapter) -> None:
    bad = {line["line"]: line["error"] for line in lines if "line" in line}
    assert bad.keys() == {3, 4, 5, 6}
    assert "not valid JSON" in bad[3] and "'ghost' is not loaded" in bad[4] and "tools" in bad[5]
    assert "the prompt has 256 tokens" in bad[6] and "max_model_len" in bad[6]
    answers = joined([line for line in lines if "line" not in line])
    chat = [257, *encode(work, "hi"), 256, 258]  # <user>hi<end><assistant>
    expected = {
        ("base", 0): dense_continuation(encode(work, PROMPTS[0]), 10),
        ("chat", 0): dense_continuation(chat, 10),
    }
    for position, prompt in enumerate(PROMPTS):
        tokens = dense_continuation(encode(work, prompt), 10, adapter)
        expected |= {(2, 2 * position): tokens, (2, 2 * position + 1): tokens}
    assert {key: ids for key, (ids, _, _) in answers.items()} == expected
    assert {tuple(reasons) for _, _, reasons in answers.values()} == {(None,) * 9 + ("length",)}
    assert answers[2, 0][1].isascii() and answers[2, 0][1] != answers["base", 0][1]


def test_a_job_runs_beside_the_requests_and_input_may_end_first(work, adapter, compilation_cache, monkeypatch, capsys):
    config = write_config(work / "beside.toml", compilation_cache, 'name = "beside"\nepochs = 2\n')
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO("\n".join(LINES[:1]).encode())))
    assert main(["run", config, "--output", str(work / "beside")]) == 0
    out, error = capsys.readouterr()
    answers = joined([json.loads(line) for line in out.splitlines()])
    assert answers["base", 0][0] == dense_continuation(encode(work, PROMPTS[0]), 10)
    assert "beside: step 4/4  loss" in error
    assert read_adapter(work / "beside" / "beside", CONFIG).rank == 4
