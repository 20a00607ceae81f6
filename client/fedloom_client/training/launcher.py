"""The process between the daemon and the ranks: torchrun's elastic launcher, set up for one host or several.

    python -m fedloom_client.training.launcher '{"parent_pid": ...}'

It runs torchrun in this process instead of the ``torchrun`` command so that devices are counted where
torch is loaded anyway, and so that the cause of a failure reaches the daemon as a file.
"""

import json
import os
import re
import signal
import socket
import sys
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from fedloom_client.training.processes import die_with_parent
from fedloom_common.errors import TrainingFailed
from fedloom_common.files import write_text

SOCKET = "FEDLOOM_SOCKET"
DEVICE = "FEDLOOM_DEVICE"
LAUNCHER_PID = "FEDLOOM_LAUNCHER_PID"
COLLECTIVE_TIMEOUT_S = "FEDLOOM_COLLECTIVE_TIMEOUT_S"

MONITOR_INTERVAL_S = 0.2  # how late a dead rank is noticed; each look costs a millisecond of CPU
SHUTDOWN_TIMEOUT_S = 5  # a stopped (SIGSTOP) rank ignores SIGTERM; torchrun's 30 s until SIGKILL is long
TRACEBACK_LINES = 15
TOGETHER_S = 2


@dataclass(frozen=True, kw_only=True)
class Launch:
    """Everything that the launcher is told, in its one argument."""

    parent_pid: int
    nproc_per_node: int | None
    device: Literal["auto", "cpu", "cuda"]
    threads_per_rank: int | None
    max_restarts: int
    collective_timeout_s: float
    nnodes: int
    rdzv_endpoint: str
    """A file on a single host; host:port at which the launchers of several hosts meet."""
    rdzv_id: str
    socket: str | None
    """The daemon's socket; none on further hosts of a site."""
    logs: str
    """Folder for the ranks' standard output and error."""
    failure: str
    """File that says why the group ended."""

    def to_json(self) -> str:
        """The argument of the launcher's command line."""
        return json.dumps(asdict(self))


def main() -> None:
    """Run one worker group to its end."""
    launch = Launch(**json.loads(sys.argv[1]))
    die_with_parent(launch.parent_pid)
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousTimeoutError

    try:
        _run(launch)
    except ChildFailedError as error:
        write_text(Path(launch.failure), describe_failure(error))
        raise
    except RendezvousTimeoutError:
        write_text(
            Path(launch.failure),
            f"fewer than {launch.nnodes} hosts (workers.nnodes) came to {launch.rdzv_endpoint} in time: is "
            "`fedloom client node` running on each of the site's further hosts?",
        )
        raise
    except TrainingFailed as error:
        write_text(Path(launch.failure), str(error))
        raise
    except Exception:
        write_text(Path(launch.failure), "the launcher failed:\n" + last_lines(traceback.format_exc()))
        raise


def last_lines(text: str) -> str:
    """The end of a traceback, where the error is."""
    return "\n".join(text.rstrip().splitlines()[-TRACEBACK_LINES:])


def describe_failure(error: Any) -> str:
    """Which rank failed first, and how, from torchrun's ChildFailedError.

    Of the ranks that failed together, one killed by a signal comes before those that raised: their broken
    connections are consequences. Ranks that failed later were ended by torchrun, which counts whole seconds.
    """
    first_s = min(failure.timestamp for failure in error.failures.values())
    together = [item for item in error.failures.items() if item[1].timestamp <= first_s + TOGETHER_S]
    rank, failure = min(together, key=lambda item: _order(item[1]))
    message = failure.message
    if isinstance(message, dict):
        told = message.get("message", "")
        kind = match[0] if (match := re.match(r"\w+", told)) else "an error"
        callstack = message.get("extraInfo", {}).get("py_callstack") or told
        return f"rank {rank} failed with {kind}:\n{last_lines(callstack)}"
    if failure.exitcode == -signal.SIGKILL:
        return f"rank {rank} was killed (SIGKILL): by somebody, or by the kernel for want of memory"
    if failure.exitcode < 0:
        return f"rank {rank} died of {failure.signal_name()}; see its stderr.log"
    return f"rank {rank} exited with status {failure.exitcode}; see its stderr.log"


def own_address(endpoint: str) -> str:
    """The address of this host that the host of ``endpoint`` can reach."""
    host, _, port = endpoint.rpartition(":")
    family, _, _, _, address = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(address)  # sends nothing: it only asks for the route
        return str(probe.getsockname()[0])


def _run(launch: Launch) -> None:
    from torch.distributed import run as torchrun

    device, ranks = _devices(launch)
    local = launch.nnodes == 1
    address = "127.0.0.1" if local else own_address(launch.rdzv_endpoint)
    _set_environment(launch, device, ranks, address)
    is_host = int(launch.socket is not None)  # the daemon's host keeps the meeting point
    rendezvous = "store_type=file,keep_alive_interval=60" if local else f"is_host={is_host}"
    Path(launch.logs).mkdir(parents=True, exist_ok=True)
    torchrun.run(  # type: ignore[no-untyped-call]
        torchrun.parse_args([  # type: ignore[no-untyped-call]
            f"--nnodes={launch.nnodes}", f"--nproc-per-node={ranks}", f"--max-restarts={launch.max_restarts}",
            f"--monitor-interval={MONITOR_INTERVAL_S}", "--rdzv-backend=c10d", f"--rdzv-conf={rendezvous}",
            f"--rdzv-endpoint={launch.rdzv_endpoint}", f"--rdzv-id={launch.rdzv_id}",
            f"--local-addr={address}", f"--log-dir={launch.logs}", "--redirects=3",
            "-m", "fedloom_client.training.worker",
        ])
    )  # fmt: skip


def _devices(launch: Launch) -> tuple[str, int]:
    import torch

    count = 0 if launch.device == "cpu" else torch.cuda.device_count()
    if launch.device == "cuda" and not count:
        raise TrainingFailed("workers.device is cuda, but this host has no CUDA device that torch can use")
    if not count:
        return "cpu", launch.nproc_per_node or 1
    ranks = launch.nproc_per_node or count
    if ranks > count:
        raise TrainingFailed(
            f"workers.nproc_per_node is {ranks}, but this host has {count} CUDA devices; lower it, or set "
            "workers.device to cpu"
        )
    return "cuda", ranks


def _set_environment(launch: Launch, device: str, ranks: int, address: str) -> None:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    interface = _interface_of(address)
    os.environ |= {
        "OMP_NUM_THREADS": str(launch.threads_per_rank or max(1, cores // ranks)),
        # spinning threads of several sites or ranks on the same cores slow each other down a hundredfold
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE"),
        DEVICE: device,
        LAUNCHER_PID: str(os.getpid()),
        COLLECTIVE_TIMEOUT_S: str(launch.collective_timeout_s),
        # torchrun's own store is kept over restarts and listens on every interface. Ranks of the next
        # attempt would find the dead ranks' addresses in it, and gloo would time out connecting to them.
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(SHUTDOWN_TIMEOUT_S),
        "GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", interface),
        "NCCL_SOCKET_IFNAME": os.environ.get("NCCL_SOCKET_IFNAME", interface),
    }
    if launch.socket is not None:
        os.environ[SOCKET] = launch.socket
    else:
        os.environ.pop(SOCKET, None)
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def _interface_of(address: str) -> str:
    import psutil

    for name, entries in psutil.net_if_addrs().items():
        if any(entry.address == address for entry in entries):
            return str(name)
    raise TrainingFailed(f"no network interface of this host has the address {address}")


def _order(failure: Any) -> tuple[bool, int]:
    killed = failure.exitcode in (-signal.SIGKILL, -signal.SIGSEGV, -signal.SIGBUS)
    file = Path(failure.error_file)
    return not killed, file.stat().st_mtime_ns if file.is_file() else sys.maxsize


if __name__ == "__main__":
    main()
