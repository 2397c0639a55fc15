"""Service: what the routes share. Each area of the API is a module with its own ``ROUTES``."""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from starlette.requests import Request

import flexjax
from flexjax.server.adapter_folders import AdapterFolders
from flexjax.server.admission import Admission
from flexjax.server.answered import Answered
from flexjax.server.bridge import Bridge
from flexjax.server.catalog import Catalog
from flexjax.server.config import ServerConfig
from flexjax.server.curves import Curves
from flexjax.server.dashboard_jobs import ConfiguredJobs
from flexjax.server.data_folder import DATABASE, DataFolder
from flexjax.server.engine_view import EngineView
from flexjax.server.job_book import JobBook
from flexjax.server.job_keeper import JobKeeper
from flexjax.server.keys import ApiKeys
from flexjax.server.limits import Limits
from flexjax.server.loaded_adapters import LoadedAdapters
from flexjax.server.owner import owner_of
from flexjax.server.rates import RateLimits
from flexjax.server.scrape import Scrape
from flexjax.server.store import Store
from flexjax.server.timeline import ServingTotals
from flexjax.server.trained_models import TrainedModels


@dataclass
class Service:
    """Attributes:
    keys: of clients.
    started: Unix seconds.

    Raises:
        ConfigError: the data folder cannot be used.
    """

    engine: "flexjax.Engine"
    config: ServerConfig
    keys: ApiKeys
    limits: Limits = field(init=False)
    admission: Admission = field(init=False)
    rates: RateLimits = field(init=False)
    folder: DataFolder = field(init=False)
    store: Store = field(init=False)
    trained: TrainedModels = field(init=False)
    loaded: LoadedAdapters = field(init=False)
    catalog: Catalog = field(init=False)
    keeper: JobKeeper = field(init=False)
    curves: Curves = field(init=False)
    configured: ConfiguredJobs = field(init=False)
    view: EngineView = field(init=False)
    scrape: Scrape = field(init=False)
    totals: ServingTotals = field(init=False)
    bridge: Bridge = field(default_factory=Bridge)
    answered: Answered = field(default_factory=Answered)
    started: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self):
        self.rates = RateLimits(self.config.requests_per_minute, self.config.tokens_per_minute)
        self.folder = DataFolder(Path(self.config.data_dir).resolve())
        try:
            self.store = Store(self.folder.root / DATABASE)
        except BaseException:
            self.folder.close()
            raise
        self.limits = Limits(self.config, self.store)
        self.admission = Admission(self.engine.config.max_rows, self.config.max_queue, self.limits.sequences)
        self.trained = TrainedModels(self.engine, self.store, self.folder, self.config.max_checkpoints)
        apart = self.keys.owners, self.private
        folders = AdapterFolders(self.config.adapters, *apart, self.folder, self.trained)
        self.loaded = LoadedAdapters(self.engine, self.store, folders, self.private)
        self.catalog = Catalog(self.engine, self.trained, self.loaded, self.private)
        book = JobBook(self.store, self.folder)
        self.keeper = JobKeeper(self.engine, book, self.trained, self.catalog)
        self.curves, self.configured = book.curves, ConfiguredJobs(self.engine)
        self.view, self.scrape = EngineView(self.engine), Scrape(self.engine)
        self.totals = ServingTotals(self.engine.config.max_model_len)

    def close(self) -> None:
        """After the engine, whose last checkpoints are still written down."""
        self.store.close()
        self.folder.close()

    @property
    def private(self) -> bool:
        """Owners are kept apart, by their keys."""
        return bool(self.keys)

    @property
    def base_name(self) -> str:
        return self.engine.config.served_model_name

    @property
    def base_names(self) -> tuple[str, str]:
        """All names that mean the base model."""
        return self.base_name, self.engine.config.model


def service_of(request: Request) -> Service:
    return request.app.state.service


def own_row(request: Request, table: str) -> tuple[str, dict[str, Any] | None]:
    """The id that the path names, and the row of it if it is the owner's."""
    identifier = request.path_params["id"]
    return identifier, service_of(request).store.find(table, id=identifier, owner=owner_of(request))
