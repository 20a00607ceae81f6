"""What rounds work with, put together."""

from dataclasses import dataclass

from fedloom_server.assignments import Assignments
from fedloom_server.config import KeepModels
from fedloom_server.meters import Meters
from fedloom_server.sites import Sites
from fedloom_server.store import Store
from fedloom_server.watching import Watching


@dataclass(frozen=True, kw_only=True)
class Federation:
    """The parts of a coordinator that every run shares."""

    store: Store
    sites: Sites
    assignments: Assignments
    watching: Watching
    meters: Meters
    keep_models: KeepModels
