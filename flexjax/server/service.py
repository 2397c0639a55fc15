"""Service: what the routes share. Each area of the API is a module with its own ``ROUTES``."""

import time
from dataclasses import dataclass, field

from starlette.requests import Request

import flexjax
from flexjax.server.admission import Admission
from flexjax.server.bridge import Bridge
from flexjax.server.config import ServerConfig
from flexjax.server.iterations import EngineGauge
from flexjax.server.timeline import ServingTotals


@dataclass
class Service:
    """Attributes:
    started: Unix seconds.
    adapter_paths: where adapters that clients loaded came from, as they named it; others are absent.
    """

    engine: "flexjax.Engine"
    config: ServerConfig
    admission: Admission = field(init=False)
    bridge: Bridge = field(default_factory=Bridge)
    totals: ServingTotals = field(default_factory=ServingTotals)
    facts: EngineGauge = field(default_factory=EngineGauge)
    started: int = field(default_factory=lambda: int(time.time()))
    adapter_paths: dict[str, str] = field(default_factory=dict)

    def __post_init__(self):
        self.admission = Admission(self.engine.config.max_rows, self.config.max_queue)

    @property
    def base_name(self) -> str:
        return self.engine.config.served_model_name

    @property
    def base_names(self) -> tuple[str, str]:
        """All names that mean the base model."""
        return self.base_name, self.engine.config.model

    def adapter_names(self) -> list[str]:
        return sorted(self.engine.adapters.named.copy())  # a copy is made in one go; the engine's thread may write


def service_of(request: Request) -> Service:
    return request.app.state.service
