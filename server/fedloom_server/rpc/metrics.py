"""The gRPC edge of a run's metrics."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import asdict
from typing import Any

import grpc

from fedloom.v1 import metrics_pb2 as pb
from fedloom.v1.metrics_pb2_grpc import MetricServiceServicer
from fedloom_server.metrics import points_of
from fedloom_server.store import Store

PAGE_POINTS = 5000  # some 300 KB


class MetricEdge(MetricServiceServicer):
    """List."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def List(  # noqa: N802 (the contract's name)
        self, request: pb.ListMetricsRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[pb.MetricPage]:
        """Every point of a run, in pages."""
        run = self._store.run(request.run_id)
        points = await asyncio.to_thread(lambda: list(points_of(self._store, run)))
        for begin in range(0, len(points), PAGE_POINTS):
            page = points[begin : begin + PAGE_POINTS]
            yield pb.MetricPage(points=[pb.MetricPoint(**asdict(point)) for point in page])
