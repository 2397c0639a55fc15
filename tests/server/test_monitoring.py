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
            own = not sample.name.startswith(("process_", "http_"))
            assert not own or (labels.pop("model_name"), labels.pop("engine")) == ("tiny", "0")
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
    assert now["vllm:iteration_tokens_total_sum",] == 10 + 16, "the first token of a sequence is its prompt's"
    first, gaps = now["vllm:time_to_first_token_seconds_sum",], now["vllm:inter_token_latency_seconds_sum",]
    assert first + gaps == pytest.approx(now["vllm:e2e_request_latency_seconds_sum",])


def test_every_sequence_is_measured_from_its_arrival_to_its_end(serving):
    """Eight sequences for four rows; what one spent on what adds up to all its time, less what came after its last
    token."""
    with serving() as server, server.client() as client:
        client.completions.create(prompt=[[1, 2, 3], [4, 5]], n=4, max_tokens=20, **BODY)
        client.completions.create(prompt=[6] * 70, max_tokens=1, **BODY)
        client.completions.create(prompt=[6] * 70, max_tokens=400, stop=["\n"], **BODY)
        now = samples(server)
    total = lambda name: now[f"vllm:{name}_sum",]
    count = lambda name: now[f"vllm:{name}_count",]
    assert total("request_prompt_tokens") == 4 * 3 + 4 * 2 + 70 + 70 and count("request_prompt_tokens") == 10
    last = int(now["vllm:generation_tokens_total",]) - 8 * 20 - 1
    assert total("request_generation_tokens") == 8 * 20 + 1 + last
    assert total("request_params_max_tokens") == 8 * 20 + 1 + (256 - 70), "no more than there is room for"
    assert (total("request_params_n"), count("request_params_n")) == (4 + 4 + 1 + 1, 4)
    assert total("request_max_num_generation_tokens") == 20 + 20 + 1 + last
    assert now["vllm:prefix_cache_queries_total",] == now["vllm:prompt_tokens_total",] == 160
    assert now["vllm:prefix_cache_hits_total",] == 64
    parts = [f"request_{part}_time_seconds" for part in ("queue", "prefill", "decode")]
    assert all(count(part) == 10 and total(part) > 0 for part in parts)
    assert sum(map(total, parts)) == pytest.approx(total("e2e_request_latency_seconds"))
    assert total(parts[1]) + total(parts[2]) == pytest.approx(total("request_inference_time_seconds"))
    assert count("request_time_per_output_token_seconds") == 8 + (last > 1)
    assert now["vllm:cache_config_info", "64", "True", "120"] == 1, "tokens of a page, whether it is kept, pages"
    assert now["process_resident_memory_bytes",] > 1e6


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


def test_answers_are_counted_by_their_routes(serving):
    """What follows a route's name in a path is no label, and a path that is not there is none."""
    with serving(api_keys=("sk-1",)) as server:
        key = {"Authorization": "Bearer sk-1"}
        ask = lambda method, path, **more: httpx.request(method, f"{server.url}{path}", headers=key, **more)
        body = {"model": "tiny", "prompt": "a", "max_tokens": 1}
        for n in (1, 1, 0):
            ask("POST", "/v1/completions", json={**body, "n": n})
        ask("GET", "/v1/models/tiny")
        ask("GET", "/v1/models/ghost")
        ask("DELETE", "/v1/models")
        ask("POST", "/v1/fine_tuning/jobs/x/cancel")
        ask("GET", "/made/up")
        httpx.get(f"{server.url}/v1/models")
        now = {key: value for key, value in samples(server).items() if key[0] == "http_requests_total"}
    assert {key[1:]: value for key, value in now.items()} == {
        ("/v1/completions", "POST", "2xx"): 2,
        ("/v1/completions", "POST", "4xx"): 1,
        ("/v1/models/{name:path}", "GET", "2xx"): 1,
        ("/v1/models/{name:path}", "GET", "4xx"): 1,
        ("/v1/models", "DELETE", "4xx"): 1,
        ("/v1/fine_tuning/jobs/{id}/cancel", "POST", "4xx"): 1,
        ("none", "GET", "4xx"): 2,
    }


def test_head_and_both_formats(server):
    head = httpx.head(f"{server.url}/metrics")
    assert head.status_code == 200 and head.content == b"" and head.headers["content-type"].startswith("text/plain")
    accept = {"Accept": "application/openmetrics-text; version=1.0.0"}
    text = httpx.get(f"{server.url}/metrics", headers=accept).text
    assert "vllm:generation_tokens" in {family.name for family in parse_openmetrics(text)}


def test_health_and_version(server):
    assert httpx.get(f"{server.url}/health").status_code == 200
    assert httpx.get(f"{server.url}/version").json() == {"version": __version__}


VLLMS_DASHBOARD = (
    *("vllm:e2e_request_latency_seconds_bucket", "vllm:e2e_request_latency_seconds_sum"),
    *("vllm:prompt_tokens_total", "vllm:generation_tokens_total", "vllm:request_success_total"),
    *("vllm:inter_token_latency_seconds_bucket", "vllm:inter_token_latency_seconds_count"),
    *("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc"),
    *("vllm:time_to_first_token_seconds_bucket", "vllm:time_to_first_token_seconds_sum"),
    *("vllm:request_prompt_tokens_bucket", "vllm:request_generation_tokens_bucket"),
    *("vllm:request_queue_time_seconds_sum", "vllm:request_prefill_time_seconds_sum"),
    *("vllm:request_decode_time_seconds_sum", "vllm:request_max_num_generation_tokens_sum"),
)
"""What the Grafana dashboard among vLLM's examples asks for, by ``model_name``."""


def test_vllms_dashboard_finds_what_it_asks_for(server):
    assert {name for name, *_ in samples(server)} >= set(VLLMS_DASHBOARD)
