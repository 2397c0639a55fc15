"""``flexjax serve``: a process that serves beside a job, and stops as it should."""

import argparse
import importlib
import json
import re
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import openai
import pytest

from flexjax.cli import main
from flexjax.cli.serve import KEY_VARIABLE, add_arguments, room_of_jobs, server_config, with_objective, without_keys
from flexjax.config import EngineConfig, load_tables
from flexjax.server.config import ServerConfig
from flexjax.tokenizer import Tokenizer
from tests.cli.conftest import write_config
from tests.cli.test_finetune import start
from tests.cli.test_generate import dense_continuation, encode

ROOT = Path(__file__).parents[2]
PROMPT = "1 and 2 make"
LONG = {"model": "tiny", "prompt": PROMPT, "max_tokens": 240, "temperature": 0, "extra_body": {"ignore_eos": True}}
SAMPLES = 16
"""Alike, and more than there are rows, so that the last of them ends long after the first token."""



def lines_until(process, pattern: str) -> tuple[list[str], re.Match]:
    """Lines of standard error up to the first that matches."""
    lines = []
    for line in process.stderr:
        lines.append(line.rstrip("\n"))
        if found := re.search(pattern, line):
            return lines, found
    raise AssertionError(f"no line matches {pattern!r} in {lines}")


def rest_of(process) -> list[str]:
    """Keeps reading, so that the process never waits for us."""
    rest: list[str] = []
    reader = threading.Thread(target=lambda: rest.extend(process.stderr), daemon=True)
    reader.start()
    return rest


@pytest.fixture
def config(work, compilation_cache) -> str:
    return write_config(work / "serve.toml", compilation_cache, 'name = "beside"\nepochs = 1\n')


def test_it_serves_beside_a_job_and_drains_when_it_is_told_to_stop(work, adapter, config):
    words = ["serve", config, "--port", "0", "--data-dir", str(work / "data"), "--adapter", f"counter={adapter}"]
    words += ["--output", str(work / "served")]
    with start(words, stderr=subprocess.PIPE) as process:
        shown, found = lines_until(process, r"ready: (http://127.0.0.1:\d+)/v1")
        rest = rest_of(process)
        with openai.OpenAI(base_url=f"{found[1]}/v1", api_key="none", max_retries=0) as client:
            assert {"tiny", "counter"} <= {model.id for model in client.models.list()}
            stream = client.completions.create(stream=True, n=SAMPLES, **LONG)
            first = next(iter(stream))
            process.send_signal(signal.SIGTERM)
            check_refusal(found[1])
            pieces = [chunk.choices[0] for chunk in [first, *stream]]
        assert process.wait(60) == 0
    expected = Tokenizer.from_directory(work / "tiny").decode(dense_continuation(encode(work, PROMPT), 40))
    for index in range(SAMPLES):
        mine = [each for each in pieces if each.index == index]
        assert mine[-1].finish_reason == "length"
        assert "".join(each.text for each in mine).startswith(expected.rstrip("\N{REPLACEMENT CHARACTER}"))
    check_shown("\n".join(shown), "".join(rest))


def check_refusal(url: str) -> None:
    """While a request runs on, the port still answers: there is no new work."""
    body = json.dumps({"prompt": "a"}).encode()
    request = urllib.request.Request(f"{url}/v1/completions", body, {"Content-Type": "application/json"})
    with pytest.raises(urllib.error.HTTPError) as caught:
        while True:
            urllib.request.urlopen(request).read()
    assert caught.value.code == 503 and json.loads(caught.value.read())["error"]["code"] == "stopping"


def check_shown(shown: str, rest: str) -> None:
    engine = ("ready 1 of", "weights", "sampling ready in", "devices: cpu")
    for words in (*engine, "adapters: counter", "4 rows of at most 256 tokens", "finetuning takes all the room"):
        assert words in shown
    assert f"SIGTERM: refusing new work, {SAMPLES} sequences end" in rest
    assert "stopped" in rest and "Traceback" not in rest
    statuses = {json.loads(line)["status"] for line in rest.splitlines() if line.startswith("{")}
    assert {200, 503} <= statuses


def arguments_of(*words):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(list(words))


def test_options_win_over_the_file_and_paths_start_where_they_are_written(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "c.toml").write_text('[server]\nport = 1\nmax_queue = 2\ndata_dir = "data"\nhost = "::1"\n')
    monkeypatch.chdir(tmp_path)
    config = server_config(arguments_of("a/c.toml", "--port", "3", "--adapter-dir", "here"))
    assert (config.host, config.port, config.max_queue) == ("::1", 3, 2)
    assert Path(config.data_dir).resolve() == tmp_path / "a" / "data" and config.adapters == tmp_path / "here"
    alone = server_config(arguments_of("--model", "m", "--data-dir", "d"))
    assert alone == ServerConfig(data_dir=str(tmp_path / "d")) and alone.adapters == tmp_path / "d" / "adapters"


def test_keys_come_from_options_or_else_from_the_environment(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.toml").write_text('[server]\napi_keys = ["sk-file"]\napi_keys_file = "keys"\n')
    assert server_config(arguments_of("c.toml")).api_keys == ("sk-file",)
    assert Path(server_config(arguments_of("c.toml")).api_keys_file).resolve() == tmp_path / "keys"
    monkeypatch.setenv(KEY_VARIABLE, "sk-environment")
    assert server_config(arguments_of("c.toml")).api_keys == ("sk-environment",)
    words = ("c.toml", "--api-key", "sk-1", "--api-key=sk-2", "--api-keys-file", "other")
    config = server_config(arguments_of(*words))
    assert config.api_keys == ("sk-1", "sk-2") and config.api_keys_file == str(tmp_path / "other")
    shown = without_keys(["flexjax", "serve", *words])
    assert not any("sk-" in word for word in shown) and len(shown) == len(words) + 2
    assert [shown[0], shown[2], shown[-1]] == ["flexjax", "c.toml", "other"]


def test_origins_are_a_list_as_vllm_has_them(capsys):
    config = server_config(arguments_of("--model", "m", "--allowed-origins", '["https://a.org", "http://b:80"]'))
    assert config.allowed_origins == ("https://a.org", "http://b:80")
    with pytest.raises(SystemExit):
        arguments_of("--allowed-origins", "https://a.org")
    assert "it is 'https://a.org'; it must be a list in JSON" in capsys.readouterr().err


def test_the_example_explains_every_setting():
    path = ROOT / "configs" / "example.toml"
    assert set(load_tables(path)["server"]) == set(ServerConfig.__dataclass_fields__)
    assert server_config(arguments_of(str(path))).adapters == ROOT / "configs" / "../runs/adapters"


@pytest.mark.parametrize(("command", "extra"), [("serve", "flexjax[server]"), ("demo", "flexjax[bench]")])
def test_packages_that_are_not_installed_are_named(monkeypatch, capsys, command, extra):
    monkeypatch.setitem(sys.modules, f"flexjax.cli.{command}", None)
    with pytest.raises(ModuleNotFoundError, match="flexjax.cli"):
        main([command])  # a module of ours is not there: our mistake
    finder = SimpleNamespace(import_module=lambda _: importlib.import_module("wombat"))
    monkeypatch.setattr("flexjax.cli.entry.importlib", finder)
    assert main([command]) == 2
    words = f"flexjax {command} needs wombat, which is not installed; install {extra}"
    assert capsys.readouterr().err == f"error: {words}\n"


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("[server]\nports = 1\n", "[server]: unknown key 'ports' (did you mean 'port'?)"),
        ("[server]\nmax_queue = -1\n", "[server]: max_queue is -1; it must be at least 0"),
        ('[server]\nport = "80"\n', "[server]: port is '80'; it must be a whole number"),
        ('[server]\napi_keys = ["a b"]\n', "api_keys number 1: a key must be 1 to 512 characters of ASCII"),
        ('[server]\napi_keys_file = "ghost"\n', "/ghost, which cannot be read: "),
        ('[server]\nhost = "192.0.2.1"\n', "cannot listen on host 192.0.2.1 port 8000"),
    ],
)
def test_mistakes_are_refused_before_the_model_is_loaded(tmp_path, capsys, table, message):
    (tmp_path / "c.toml").write_text('[engine]\nmodel = "m"\n' + table)
    assert main(["serve", str(tmp_path / "c.toml")]) == 2
    out, error = capsys.readouterr()
    assert out == "" and error.count("\n") == 1 and message in error


@pytest.mark.parametrize(
    ("platform", "given", "objective", "room"),
    [
        ("gpu", {}, 50.0, "the time that requests leave within 50 ms an output token"),
        ("cpu", {}, None, "all the room it finds: there is no objective; tpot_objective_ms is one"),
        ("gpu", {"policy": "flat_out"}, None, "all the room it finds: there is no objective; tpot_objective_ms is one"),
        ("gpu", {"tpot_objective_ms": 20}, 20.0, "the time that requests leave within 20 ms an output token"),
        ("gpu", {"itl_objective_ms": 30}, None, "the time that requests leave within 30 ms a gap between two"),
    ],
)
def test_jobs_of_clients_find_an_objective_on_a_gpu(platform, given, objective, room):
    config = with_objective(EngineConfig(model="m", **given), platform)
    assert config.tpot_objective_ms == objective
    assert room_of_jobs(config.resolved(64, platform)) == f"finetuning takes {room}"
