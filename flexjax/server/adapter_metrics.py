"""What /metrics says of adapters: which requests use them, which are on the device, how often they come and go."""

import time
from collections.abc import Iterator
from dataclasses import dataclass

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

import flexjax


@dataclass(frozen=True)
class AdapterFacts:
    """Attributes:
    running, waiting: names of adapters that requests with a row use, and those without one.
    unstarted: requests whose adapter is not on the device yet; the scheduler does not know them.
    places: for adapters on the device; resident: those that have one, versions of jobs among them.
    host_bytes: of adapters in the host's memory.
    """

    running: tuple[str, ...]
    waiting: tuple[str, ...]
    unstarted: int
    places: int
    resident: int
    loads: int
    evictions: int
    host_bytes: int

    @classmethod
    def gather(cls, engine: "flexjax.Engine") -> "AdapterFacts":
        """On the engine's thread."""
        tier, seated = engine.library.tier, set(engine.scheduler.running)
        names = {True: set(), False: set()}
        for request, serving in engine.loop.serving.items():
            if serving.adapter.name is not None:
                names[request in seated].add(serving.adapter.name)
        return cls(
            running=tuple(sorted(names[True])),
            waiting=tuple(sorted(names[False])),
            unstarted=tier.waiting,
            places=tier.table.adapters - 1,
            resident=len(tier.table.resident),
            loads=tier.loads,
            evictions=tier.evictions,
            host_bytes=engine.library.host.bytes,
        )

    def families(self, labels: dict[str, str]) -> Iterator[Metric]:
        yield self._requests(labels)
        yield simple(GaugeMetricFamily, "flexjax:adapters_resident", "On the device.", labels, self.resident)
        yield simple(GaugeMetricFamily, "flexjax:adapter_places", "For them on the device.", labels, self.places)
        yield simple(GaugeMetricFamily, "flexjax:adapter_host_bytes", "In main memory.", labels, self.host_bytes)
        text = "Adapters that came to the device because a request asked for them."
        yield simple(CounterMetricFamily, "flexjax:adapter_loads", text, labels, self.loads)
        yield simple(CounterMetricFamily, "flexjax:adapter_evictions", "That left for others.", labels, self.evictions)

    def _requests(self, labels: dict[str, str]) -> Metric:
        """As vLLM has it: the names are in labels, the value is the time."""
        names = ("max_lora", "waiting_lora_adapters", "running_lora_adapters")
        family = GaugeMetricFamily("vllm:lora_requests_info", "Adapters of requests.", labels=[*labels, *names])
        values = (str(self.places), ",".join(self.waiting), ",".join(self.running))
        family.add_metric([*labels.values(), *values], time.time())
        return family


def simple(kind: type[Metric], name: str, text: str, labels: dict[str, str], value: float) -> Metric:
    """A family of one value."""
    family = kind(name, text, labels=list(labels))
    family.add_metric(list(labels.values()), value)
    return family
