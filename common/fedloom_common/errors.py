"""Every failure that crosses a module or process boundary, and the name of its gRPC status.

FederationError
├── NeverRetry             the same call would fail again
│   ├── ProtocolError      the peer broke the contract
│   │   └── BadTensor      an update differs from the model's manifest, or is not finite
│   ├── BadSpec            a run spec or a config has a wrong key or value
│   ├── NotPermitted       the peer's identity, or the site's policy, does not allow it
│   │   └── NotIdentified  the caller's certificate does not, or no longer, say who it is
│   ├── NotFound           no such run, round, upload or file
│   └── WrongState         the run or assignment is not in a state for this
└── AttemptFailed          this attempt failed; another may succeed
    ├── BadChunk           a chunk is out of order, corrupt or too large
    ├── TrainingFailed     the worker group at a site could not finish
    ├── TooFewSites        fewer sites are connected than a round needs
    ├── TooFewUpdates      fewer sites reported than the quorum asks for
    ├── Unreachable        the peer does not answer
    ├── TooManyCalls       the peer has too many calls under way
    ├── StorageFull        no space left for what must be stored
    └── StorageUnavailable the database or the storage of models does not answer
"""


class FederationError(Exception):
    """Base of all failures that fedloom names. The message is fit for the peer to read."""

    status = "INTERNAL"


class NeverRetry(FederationError):
    """The same call would fail again."""

    status = "FAILED_PRECONDITION"


class ProtocolError(NeverRetry):
    """The peer broke the contract."""

    status = "INVALID_ARGUMENT"


class BadTensor(ProtocolError):
    """An update differs from the model's manifest, or holds a value that is not finite."""


class BadSpec(NeverRetry):
    """A run spec or a config has a wrong key or value."""

    status = "INVALID_ARGUMENT"


class NotPermitted(NeverRetry):
    """The peer's identity, or the site's policy, does not allow it."""

    status = "PERMISSION_DENIED"


class NotIdentified(NotPermitted):
    """The caller's certificate does not, or no longer, say who it is; a new one may."""

    status = "UNAUTHENTICATED"


class NotFound(NeverRetry):
    """No such run, round, upload or file."""

    status = "NOT_FOUND"


class WrongState(NeverRetry):
    """The run or assignment is not in a state that allows the call."""


class AttemptFailed(FederationError):
    """This attempt failed; another may succeed."""

    status = "ABORTED"


class BadChunk(AttemptFailed):
    """A chunk is out of order, corrupt or too large."""

    status = "DATA_LOSS"


class TrainingFailed(AttemptFailed):
    """The worker group at a site could not finish an assignment."""


class TooFewSites(AttemptFailed):
    """Fewer sites are connected than a round needs."""


class TooFewUpdates(AttemptFailed):
    """Fewer sites reported than the quorum asks for."""


class Unreachable(AttemptFailed):
    """The peer does not answer."""

    status = "UNAVAILABLE"


class TooManyCalls(AttemptFailed):
    """The peer has too many calls under way."""

    status = "RESOURCE_EXHAUSTED"


class StorageFull(AttemptFailed):
    """No space is left for what must be stored."""

    status = "RESOURCE_EXHAUSTED"


class StorageUnavailable(AttemptFailed):
    """The database, or the storage of models, does not answer."""

    status = "UNAVAILABLE"
