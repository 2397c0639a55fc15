"""/metrics: what Prometheus reads. Names are vLLM's where the meaning is, else begin with ``flexjax:``."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from flexjax.layout import PAGE_TOKENS
from flexjax.server.iterations import EngineFacts
from flexjax.server.scrape import Scraped
from flexjax.server.service import Service, service_of
from flexjax.server.timeline import ServingTotals

ENGINE = "0"
"""vLLM counts its engines; here there is one."""

PROCESS = ProcessCollector(registry=None)
"""Memory, time and open files of this process, under the names that every Prometheus client has."""


class Snapshot:
    """What a registry collects from: families made beforehand."""

    def __init__(self, families: list[Metric]):
        self._families = families

    def collect(self) -> list[Metric]:
        return self._families


def gauge(name: str, text: str, labels: dict[str, str], value: float) -> Metric:
    family = GaugeMetricFamily(name, text, labels=list(labels))
    family.add_metric(list(labels.values()), value)
    return family


def counter(name: str, text: str, labels: dict[str, str], values: dict[str, float], by: str | None = None) -> Metric:
    """``values`` by the value of the label ``by``; the one value where there is none."""
    family = CounterMetricFamily(name, text, labels=[*labels, by] if by else list(labels))
    for key, value in values.items():
        family.add_metric([*labels.values(), key] if by else list(labels.values()), value)
    return family


def request_families(totals: ServingTotals, labels: dict[str, str]) -> Iterator[Metric]:
    yield counter("vllm:prompt_tokens", "Prompt tokens processed.", labels, {"": totals.prompt_tokens})
    yield counter("vllm:generation_tokens", "Tokens generated.", labels, {"": totals.generation_tokens})
    yield counter("vllm:request_success", "Sequences that ended.", labels, totals.ended, by="finished_reason")
    yield totals.ttft.family("vllm:time_to_first_token_seconds", "From arrival to the first token.", labels)
    yield totals.itl.family("vllm:inter_token_latency_seconds", "Between two tokens of a sequence.", labels)
    text = "Prompt tokens looked for in the cache"
    yield counter("vllm:prefix_cache_queries", f"{text}.", labels, {"": totals.prompt_tokens})
    yield counter("vllm:prefix_cache_hits", f"{text} and found.", labels, {"": totals.cached_tokens})
    yield counter("vllm:prompt_tokens_cached", "Prompt tokens not computed.", labels, {"": totals.cached_tokens})
    yield from totals.spans.families(labels)


def engine_families(facts: EngineFacts, unstarted: int, labels: dict[str, str]) -> Iterator[Metric]:
    """``unstarted``: requests that wait for their adapter, before they wait for a row."""
    now, totals = facts.statistics, facts.totals
    used = (now.pages - now.available_pages) / now.pages
    yield gauge("vllm:num_requests_running", "Sequences that have a row.", labels, now.running)
    yield gauge("vllm:num_requests_waiting", "Sequences that wait for one.", labels, now.waiting + unstarted)
    yield gauge("vllm:kv_cache_usage_perc", "Pages in use, 1 is all; tapes are among them.", labels, used)
    yield counter("vllm:num_preemptions", "Sequences that lost their row to others.", labels, {"": now.preemptions})
    yield counter("flexjax:prefix_hit_pages", "Pages reused, not computed.", labels, {"": now.prefix_hits})
    yield counter("flexjax:iterations", "Iterations of the engine.", labels, {"": totals.iterations})
    yield counter("flexjax:iteration_seconds", "Their time.", labels, totals.seconds, by="part")
    yield counter("flexjax:finetune_tokens", "Tokens that went forward.", labels, {"": totals.finetune_tokens})
    yield counter("flexjax:backward_units", "Backward units run.", labels, {"": totals.backward_units})
    yield counter("flexjax:optimizer_steps", "Updates of adapters.", labels, {"": totals.updates})
    yield facts.tokens.family("vllm:iteration_tokens_total", "Of requests, in an iteration with any.", labels)
    share, room = facts.finetune_share, facts.headroom_seconds
    yield gauge("flexjax:iteration_finetune_share", "Share of finetuning in the newest iterations.", labels, share)
    if room is not None:
        yield gauge("flexjax:objective_headroom_seconds", "Mean time they left of the objective.", labels, room)
    versions = GaugeMetricFamily("flexjax:adapter_version", "Version that serves.", labels=[*labels, "adapter"])
    for name, version in facts.adapter_versions.items():
        versions.add_metric([*labels.values(), name], version)
    yield versions


def job_families(service: Service, labels: dict[str, str]) -> list[Metric]:
    """Of the jobs that clients created; on a worker's thread, since the database may wait for the disk."""
    jobs = GaugeMetricFamily("flexjax:finetune_jobs", "Jobs of clients.", labels=[*labels, "status"])
    for status, count in service.store.count("jobs", "status").items():
        jobs.add_metric([*labels.values(), status], count)
    losses = GaugeMetricFamily("flexjax:finetune_loss", "Of a running job's newest step.", labels=[*labels, "job"])
    for name, loss in service.keeper.losses().items():
        losses.add_metric([*labels.values(), name], loss)
    return [jobs, losses]


def scraped_families(service: Service, scraped: Scraped, labels: dict[str, str]) -> Iterator[Metric]:
    """What the engine said, and how long ago that was."""
    yield from engine_families(scraped.engine, scraped.adapters.unstarted, labels)
    yield cache_family(service, scraped.engine, labels)
    yield from scraped.adapters.families(labels)
    text = "Since the engine said what is shown of it; it grows while the engine does not answer."
    yield gauge("flexjax:engine_age_seconds", text, labels, scraped.age)


def cache_family(service: Service, facts: EngineFacts, labels: dict[str, str]) -> Metric:
    """What is known of the pool of pages is in labels, as vLLM has it."""
    known = {"block_size": PAGE_TOKENS, "num_gpu_blocks": facts.statistics.pages}
    known["enable_prefix_caching"] = service.engine.config.prefix_caching
    settings = {name: str(value) for name, value in known.items()}
    return gauge("vllm:cache_config_info", "A block is a page of so many tokens.", labels | settings, 1)


async def metrics(request: Request) -> Response:
    service = service_of(request)
    labels = {"model_name": service.base_name, "engine": ENGINE}
    scraped = await service.scrape.look()
    jobs = await run_in_threadpool(job_families, service, labels)
    registry = CollectorRegistry()
    registry.register(PROCESS)
    families = [] if scraped is None else list(scraped_families(service, scraped, labels))
    families += [*request_families(service.totals, labels), *jobs, *service.answered.families()]
    registry.register(Snapshot(families))
    encode, content_type = choose_encoder(request.headers.get("accept", ""))
    return Response(encode(registry), headers={"Content-Type": content_type})


ROUTES = (Route("/metrics", metrics, methods=["GET", "HEAD"]),)
