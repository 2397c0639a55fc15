"""/metrics as Prometheus's own parser reads them, /health and /version."""

from collections import deque
from types import SimpleNamespace

import httpx
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse

from flexjax.engine.metrics import IterationRecord
from flexjax.server import engine_view, health, scrape
from flexjax.server.iterations import EngineGauge
from flexjax.version import __version__
from tests.server.conftest import halted, wait_until

BODY = {"model": "tiny", "temperature": 0, "extra_body": {"ignore_eos": True}}


def samples(server) -> dict[tuple[str, ...], float]:
    """Value of every sample, by its name and the values of its labels but the model's name."""
    found = {}
    for family in parse(httpx.get(f"{server.url}/metrics").text):
        for sample in family.samples:
            labels = dict(sample.labels)
            assert labels.pop("model_name") == "tiny"
            found[sample.name, *labels.values()] = sample.value
    return found


def test_tokens_and_moments_are_counted(serving):
    with serving() as server, server.client() as client:
        client.completions.create(prompt=[[1, 2, 3], [4, 5]], n=2, max_tokens=5, **BODY)
        now = samples(server)
    assert now["vllm:prompt_tokens_total",] == 10 and now["vllm:generation_tokens_total",] == 20
    ends = {key[1]: value for key, value in now.items() if key[0] == "vllm:request_success_total"}
    assert ends == {"stop": 0, "length": 4, "abort": 0, "error": 0}
    assert now["vllm:time_to_first_token_seconds_count",] == now["vllm:e2e_request_latency_seconds_count",] == 4
    assert now["vllm:inter_token_latency_seconds_count",] == 16
    assert now["vllm:inter_token_latency_seconds_bucket", "+Inf"] == 16
    first, gaps = now["vllm:time_to_first_token_seconds_sum",], now["vllm:inter_token_latency_seconds_sum",]
    assert first + gaps == pytest.approx(now["vllm:e2e_request_latency_seconds_sum",])


def test_rows_queue_and_pages_are_those_of_the_moment(server, client):
    """Four rows; the others wait. A page holds 64 tokens, so each row has one to four of the 120."""
    with client.completions.create(prompt=[7], max_tokens=250, n=64, stream=True, **BODY) as stream:
        next(iter(stream))
        wait_until(lambda: samples(server)["vllm:num_requests_running",] == 4)
        now = samples(server)
    assert now["vllm:num_requests_running",] == 4 and 0 < now["vllm:num_requests_waiting",] <= 60
    assert 4 / 120 <= now["vllm:kv_cache_usage_perc",] <= 16 / 120
    wait_until(lambda: samples(server)["vllm:num_requests_running",] == 0)
    now = samples(server)
    assert now["vllm:num_requests_waiting",] == now["vllm:kv_cache_usage_perc",] == 0


def record(index: int, start: float, seconds: float, **values) -> IterationRecord:
    names = ("decode_slots", "prompt_slots", "finetune_slots", "loss_units", "backward_units", "updates")
    counts = {name: values.get(name, 0) for name in names}
    share = values.get("inference_share", 1.0)
    return IterationRecord(index, start, seconds, seconds, values.get("limit"), inference_share=share, **counts)


def test_iterations_are_counted_once_and_shares_look_back_ten_seconds():
    """By hand: of the newest ten seconds (from 11.5 on) 4 s are finetuning's, of 1 + 6 s in all."""
    gauge, loop = EngineGauge(), SimpleNamespace(records=deque())
    adapters = SimpleNamespace(named={"poet": SimpleNamespace(version=3)})
    engine = SimpleNamespace(loop=loop, adapters=adapters, scheduler=SimpleNamespace(statistics="now"))
    assert gauge.gather(engine).finetune_share == 0.0
    loop.records.append(record(0, 0.0, 2.0, decode_slots=3, prompt_slots=1))
    first = gauge.gather(engine)
    assert first.totals.seconds == {"decode": 1.5, "prompt": 0.5, "finetune": 0.0} and first.headroom_seconds is None
    loop.records.append(record(1, 12.0, 1.0, decode_slots=1, limit=1.5))
    third = {"finetune_slots": 128, "backward_units": 5, "updates": 1, "inference_share": 1 / 3}
    loop.records.append(record(2, 15.5, 6.0, decode_slots=1, limit=5.5, **third))
    facts = gauge.gather(engine)
    assert facts.totals == gauge.gather(engine).totals, "what was counted is not counted again"
    assert facts.totals.seconds == pytest.approx({"decode": 1.5 + 1 + 2, "prompt": 0.5, "finetune": 4.0})
    assert (facts.totals.iterations, facts.totals.finetune_tokens, facts.totals.backward_units) == (3, 128, 5)
    assert facts.totals.updates == 1 and facts.finetune_share == pytest.approx(4 / 7)
    assert facts.headroom_seconds == pytest.approx((0.5 - 0.5) / 2)
    assert facts.adapter_versions == {"poet": 3} and facts.statistics == "now"


def test_a_scrape_waits_for_no_engine_that_stands_still(serving, engine, monkeypatch):
    """Before the engine has ever answered there is nothing of it; then what it said last, with its age."""
    monkeypatch.setattr(scrape, "PATIENCE", 0.2)
    with serving() as server, server.client() as client:
        with halted(engine):
            first = samples(server)
        assert ("vllm:generation_tokens_total",) in first and ("vllm:num_requests_running",) not in first
        client.completions.create(prompt=[1, 2, 3], max_tokens=5, **BODY)
        wait_until(lambda: ("flexjax:iterations_total",) in samples(server))
        before = samples(server)
        with halted(engine):
            held = [samples(server) for _ in range(2)]
        after = samples(server)
    assert [each["flexjax:iterations_total",] for each in held] == [before["flexjax:iterations_total",]] * 2
    assert 0.2 <= held[0]["flexjax:engine_age_seconds",] < held[1]["flexjax:engine_age_seconds",]
    assert after["flexjax:engine_age_seconds",] < held[1]["flexjax:engine_age_seconds",]


def test_the_dashboard_and_health_say_that_the_engine_stands_still(serving, engine, monkeypatch):
    monkeypatch.setattr(engine_view, "PATIENCE", 0.2)
    monkeypatch.setattr(health, "PATIENCE", 0.2)
    with serving() as server:
        with halted(engine):
            busy = [httpx.get(f"{server.url}{path}") for path in ("/dashboard.json", "/health")]
        assert [each.status_code for each in busy] == [503, 503]
        assert {each.json()["error"]["code"] for each in busy} == {"engine_busy"}
        assert httpx.get(f"{server.url}/dashboard.json").status_code == 200


def test_head_and_both_formats(server):
    head = httpx.head(f"{server.url}/metrics")
    assert head.status_code == 200 and head.content == b"" and head.headers["content-type"].startswith("text/plain")
    accept = {"Accept": "application/openmetrics-text; version=1.0.0"}
    text = httpx.get(f"{server.url}/metrics", headers=accept).text
    assert "vllm:generation_tokens" in {family.name for family in parse_openmetrics(text)}


def test_health_and_version(server):
    assert httpx.get(f"{server.url}/health").status_code == 200
    assert httpx.get(f"{server.url}/version").json() == {"version": __version__}
