"""What an operator's own file says: where the coordinator is, and as whom to talk to it."""

from fedloom_common.identity import TlsFiles
from fedloom_common.settings import Address
from fedloom_common.strict import Name, Strict


class OperatorConfig(Strict):
    """The config of the operator's commands, operator.yaml."""

    coordinator: Address
    """host:port of the coordinator."""
    tls: TlsFiles | None = None
    """This operator's certificate, its key and the federation's CA."""
    insecure: Name | None = None
    """Instead of ``tls``, for tests on one machine: an operator's name sent in clear; loopback only."""
