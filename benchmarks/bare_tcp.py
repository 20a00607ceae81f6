"""Raw TCP upload: what loopback, the kernel and, where asked for, an addition cost without any protocol."""

import socket
import threading
from collections.abc import Callable

import numpy as np
from bare_process import ACCUMULATING, CHUNK_BYTES, Setting, Sum

BUFFER_BYTES = 4 << 20
SOURCE_BYTES = 64 << 20  # sent over and over: past every cache, as a model is


def serve(setting: Setting, held: Sum) -> None:
    """Receive models, one thread a site; each is answered with a byte."""
    listener = socket.create_server(("127.0.0.1", setting.port), backlog=64)
    threading.Thread(target=_accept, args=(listener, setting, held), daemon=True).start()


def connect(setting: Setting) -> Callable[[], None]:
    """A function that sends one model."""
    connection = socket.create_connection(("127.0.0.1", setting.port))
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER_BYTES)
    ones = np.ones(SOURCE_BYTES // 4, np.float32).data.cast("B")

    def transfer() -> None:
        for offset in range(0, setting.model_bytes, CHUNK_BYTES):
            begin = offset % SOURCE_BYTES
            connection.sendall(ones[begin : begin + min(CHUNK_BYTES, setting.model_bytes - offset)])
        assert connection.recv(1)

    return transfer


def _accept(listener: socket.socket, setting: Setting, held: Sum) -> None:
    adding = threading.Lock()
    while True:
        connection, _ = listener.accept()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER_BYTES)
        threading.Thread(target=_receive, args=(connection, setting, held, adding), daemon=True).start()


def _receive(connection: socket.socket, setting: Setting, held: Sum, adding: threading.Lock) -> None:
    buffer = memoryview(bytearray(CHUNK_BYTES))
    while True:
        for offset in range(0, setting.model_bytes, CHUNK_BYTES):
            piece = buffer[: min(CHUNK_BYTES, setting.model_bytes - offset)]
            if not _fill(connection, piece):
                return
            if setting.kind in ACCUMULATING:
                with adding:
                    held.add(offset, piece)
        connection.sendall(b"+")


def _fill(connection: socket.socket, piece: memoryview) -> bool:
    done = 0
    while done < len(piece):
        count = connection.recv_into(piece[done:])
        if count == 0:
            return False
        done += count
    return True
