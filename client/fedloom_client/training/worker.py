"""The entry of a rank: torchrun starts ``python -m fedloom_client.training.worker``."""

import os
import socket

from fedloom_client.training import launcher
from fedloom_client.training.processes import die_with_parent, leave_at_once


def main() -> None:
    """Live as a rank until the daemon wants no more, or the launcher ends."""
    die_with_parent(int(os.environ[launcher.LAUNCHER_PID]))
    listener = _reserve_port()  # before the imports, which take seconds
    from torch.distributed.elastic.multiprocessing.errors import record

    record(_work)(listener)
    leave_at_once()


def _reserve_port() -> socket.socket | None:
    """Take the store's port, on the rank that will keep the store: the launcher only saw that it was free.

    Bound to the one address that the ranks use, because a TCPStore lets in everybody who can connect.
    """
    if os.environ["RANK"] != "0" or os.environ["WORLD_SIZE"] == "1":
        return None
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return socket.create_server((address, port), family=socket.AF_INET6 if ":" in address else socket.AF_INET)


def _work(listener: socket.socket | None) -> None:
    from fedloom_client.training.group import join
    from fedloom_client.training.service import serve
    from fedloom_common.memory import keep_memory_between_steps

    keep_memory_between_steps()
    serve(join(listener), os.environ.get(launcher.SOCKET))


if __name__ == "__main__":
    main()
