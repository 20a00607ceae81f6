"""Lines of native code, as gRPC's core really writes them."""

import logging
import subprocess
import sys

import pytest

from fedloom_common.bursts import Bursts
from fedloom_common.nativelines import REPEAT_S, Handshakes, handshakes, log_native_line

NO_CERTIFICATE = (
    "I1123 03:14:56.551159   77 ssl_transport_security.cc:2563] Handshake failed with error SSL_ERROR_SSL: "
    "error:100000c0:SSL routines:OPENSSL_internal:PEER_DID_NOT_RETURN_A_CERTIFICATE: "
    "Invalid certificate verification context"
)


def test_a_failed_handshake_is_a_warning_with_its_cause_and_is_counted(caplog):
    before = handshakes.failed

    log_native_line(NO_CERTIFICATE)

    assert handshakes.failed == before + 1
    [record] = caplog.records
    assert (record.levelname, record.getMessage()) == ("WARNING", "TLS handshake failed")
    assert record.reason == "PEER_DID_NOT_RETURN_A_CERTIFICATE: Invalid certificate verification context"


def test_a_peer_that_knocks_all_day_is_counted_and_logged_once_a_minute(caplog):
    now_s = 1000.0
    known = Handshakes(_told=Bursts(1 / REPEAT_S, 1, lambda: now_s))

    for _ in range(500):
        known.note("WRONG_VERSION")
    now_s += 61
    known.note("WRONG_VERSION")

    assert known.failed == 501
    assert [getattr(record, "untold_before", None) for record in caplog.records] == [None, "499"]


@pytest.mark.parametrize(
    ("line", "logger", "level", "message"),
    [
        pytest.param(
            "E0000 00:00:1700000000.123456   77 chttp2_server.cc:55] port in use",
            "grpc", logging.ERROR, "port in use", id="absl-error",
        ),
        pytest.param(
            "malloc(): corrupted top size",
            "fedloom_common.nativelines", logging.WARNING, "native code wrote", id="anything-else",
        ),
    ],
)  # fmt: skip
def test_other_lines_keep_their_severity(line, logger, level, message, caplog):
    log_native_line(line)

    [record] = caplog.records
    assert (record.name, record.levelno, record.getMessage()) == (logger, level, message)


def test_what_native_code_writes_comes_out_as_a_log_line_and_nothing_is_lost_at_the_end():
    program = (
        "import os, time\n"
        "from fedloom_common.nativelines import route_native_lines\n"
        "from fedloom_common.logs import set_up_logging\n"
        "route_native_lines(); set_up_logging('json', 'INFO')\n"
        "os.write(2, b'W0000 00:00:1.0 1 some.cc:9] from native code\\n')\n"
        "time.sleep(0.5)\n"
        "raise SystemExit('the last word')\n"
    )

    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60
    )

    first, last = done.stderr.splitlines()
    assert '"message": "from native code"' in first
    assert '"logger": "grpc"' in first
    assert last == "the last word"
