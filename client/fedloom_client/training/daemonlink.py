"""Rank 0's end of the daemon's socket."""

import queue
import socket
import threading
from collections.abc import Iterable
from dataclasses import asdict

from fedloom_client.training.orders import Job, WorkerProgress, WorkerResult, decode, encode


class DaemonLink:
    """Takes jobs from the daemon and reports to it."""

    def __init__(self, path: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.connect(path)
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._stop = threading.Event()
        threading.Thread(target=self._listen, name="daemonlink", daemon=True).start()

    def next_job(self) -> Job | None:
        """Wait for a job; None when the daemon wants no more."""
        return self._jobs.get()

    def stop_wanted(self) -> bool:
        """Whether the job under way is no longer wanted."""
        return self._stop.is_set()

    def ready(self, ranks: int) -> None:
        """Say that the group waits for work."""
        self._send("ready", {"ranks": ranks})

    def progress(self, progress: WorkerProgress) -> None:
        """Say how far the job has come."""
        self._send("progress", asdict(progress))

    def result(self, result: WorkerResult) -> None:
        """Say that the job is done."""
        self._send("result", asdict(result))

    def failed(self, message: str) -> None:
        """Say that the job cannot be done; the group can do others."""
        self._send("failed", message)

    def cancelled(self) -> None:
        """Say that the job was stopped as asked."""
        self._send("cancelled")

    def _send(self, kind: str, body: object = None) -> None:
        self._socket.sendall(encode(kind, body))

    def _listen(self) -> None:
        try:
            with self._socket.makefile("rb") as lines:
                self._follow(lines)
        finally:
            self._stop.set()
            self._jobs.put(None)

    def _follow(self, lines: Iterable[bytes]) -> None:
        current = ""
        for line in lines:
            kind, body = decode(line)
            if kind == "job":
                job = Job.from_json(body)
                current = job.order.id
                self._stop.clear()
                self._jobs.put(job)
            elif kind == "cancel" and body == current:
                self._stop.set()
            elif kind == "stop":
                return
