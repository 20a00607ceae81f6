"""FederationErrors across gRPC: from error to status at the server, and back at the caller."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import grpc

from fedloom_common import errors
from fedloom_common.errors import FederationError

ERROR_KEY = "fedloom-error"  # trailing metadata: the error's class, finer than its status
TIME_KEY = "fedloom-time"  # trailing metadata of a health check: the server's clock, in seconds since 1970
TEXT_LIMIT = 4000  # a status text travels in an HTTP/2 header, whose block grpc caps at 8 KiB


def status_of(error: FederationError) -> tuple[grpc.StatusCode, str, tuple[tuple[str, str], ...]]:
    """Status, text and trailing metadata that carry an error to the caller."""
    return grpc.StatusCode[error.status], str(error)[:TEXT_LIMIT], ((ERROR_KEY, type(error).__name__),)


@contextmanager
def federation_errors(peer: str) -> Iterator[None]:
    """Turn every gRPC error inside into the FederationError that it stands for.

    Raises:
        FederationError: of the class that the peer raised, or the nearest by status.
    """
    try:
        yield
    except grpc.RpcError as error:
        raise error_of(error, peer) from error


def error_of(error: grpc.RpcError, peer: str) -> FederationError:
    """The FederationError that a gRPC error stands for; ``peer`` is named when it does not answer."""
    code, text = error.code(), error.details() or ""
    trailing: Any = error.trailing_metadata() or ()
    named = dict(trailing).get(ERROR_KEY, "")
    kind = getattr(errors, str(named), None)
    if isinstance(kind, type) and issubclass(kind, FederationError):
        return kind(text)
    kind = BY_STATUS.get(code, FederationError)
    if kind is errors.Unreachable:
        return kind(f"{peer} does not answer ({code.name.lower()}: {text})")
    return kind(f"{peer} answered {code.name}: {text}")


BY_STATUS: dict[grpc.StatusCode, type[FederationError]] = {
    grpc.StatusCode.UNAVAILABLE: errors.Unreachable,
    grpc.StatusCode.DEADLINE_EXCEEDED: errors.Unreachable,
    grpc.StatusCode.CANCELLED: errors.Unreachable,
    grpc.StatusCode.UNKNOWN: errors.Unreachable,
    grpc.StatusCode.INTERNAL: errors.Unreachable,  # grpc gives this for broken connections too
    grpc.StatusCode.UNAUTHENTICATED: errors.NotIdentified,
    grpc.StatusCode.PERMISSION_DENIED: errors.NotPermitted,
    grpc.StatusCode.NOT_FOUND: errors.NotFound,
    grpc.StatusCode.INVALID_ARGUMENT: errors.ProtocolError,
    grpc.StatusCode.OUT_OF_RANGE: errors.ProtocolError,
    grpc.StatusCode.UNIMPLEMENTED: errors.ProtocolError,
    grpc.StatusCode.FAILED_PRECONDITION: errors.WrongState,
    grpc.StatusCode.ALREADY_EXISTS: errors.WrongState,
    grpc.StatusCode.ABORTED: errors.AttemptFailed,
    grpc.StatusCode.DATA_LOSS: errors.BadChunk,
    grpc.StatusCode.RESOURCE_EXHAUSTED: errors.StorageFull,
}
