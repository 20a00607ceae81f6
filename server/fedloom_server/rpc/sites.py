"""The gRPC edge of operators' calls about sites."""

from fedloom.v1 import runs_pb2
from fedloom.v1 import sites_pb2 as pb
from fedloom.v1.sites_pb2_grpc import SiteServiceServicer
from fedloom_server.admission import Admission
from fedloom_server.roster import Site
from fedloom_server.rpc.access import Context
from fedloom_server.rpc.messages import site_message
from fedloom_server.store import Store


class SiteEdge(SiteServiceServicer):
    """Get, Drain, Undrain, Block, Unblock, Forget and Label."""

    def __init__(self, admission: Admission, store: Store) -> None:
        self._admission = admission
        self._store = store

    async def Get(self, request: pb.GetSiteRequest, context: Context) -> runs_pb2.Site:  # noqa: N802
        """One site."""
        return self._message(self._admission.site(request.name))

    async def Drain(self, request: pb.DrainSiteRequest, context: Context) -> runs_pb2.Site:  # noqa: N802
        """Give a site nothing new."""
        return self._message(self._admission.drain(request.name, request.reason))

    async def Undrain(self, request: pb.UndrainSiteRequest, context: Context) -> runs_pb2.Site:  # noqa: N802
        """Give a draining site work again."""
        return self._message(self._admission.undrain(request.name))

    async def Block(self, request: pb.BlockSiteRequest, context: Context) -> runs_pb2.Site:  # noqa: N802
        """Refuse a site."""
        return self._message(self._admission.block(request.name, request.reason))

    async def Unblock(self, request: pb.UnblockSiteRequest, context: Context) -> runs_pb2.Site:  # noqa: N802
        """Let a blocked site attach again."""
        return self._message(self._admission.unblock(request.name))

    async def Forget(  # noqa: N802
        self, request: pb.ForgetSiteRequest, context: Context
    ) -> pb.ForgetSiteResponse:
        """Remove what is known of a site."""
        self._admission.forget(request.name)
        return pb.ForgetSiteResponse()

    async def Label(self, request: pb.LabelSiteRequest, context: Context) -> runs_pb2.Site:  # noqa: N802
        """Set a site's labels."""
        labels, dropped = dict(request.labels), frozenset(request.dropped)
        return self._message(self._admission.label(request.name, labels, dropped))

    def _message(self, site: Site) -> runs_pb2.Site:
        mine = [work.id for work in self._store.open_assignments() if work.site == site.name]
        return site_message(site, mine)
