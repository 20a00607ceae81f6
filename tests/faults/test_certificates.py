"""Claims about certificates that end, or have not begun."""

import asyncio
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key
from faults.federation import Federation, federation_of

from fedloom_common.files import write_text

LIFE_S = 15


def reissue(federation: Federation, name: str, *, begins_in_s: float, ends_in_s: float) -> None:
    """Sign a site's or the coordinator's certificate again, with another time of validity."""
    folder = federation.kit / "coordinator" if name == "coordinator" else federation.site_folder(name)
    path = folder / ("coordinator.crt" if name == "coordinator" else "site.crt")
    key = load_pem_private_key((federation.kit / "ca/ca.key").read_bytes(), password=None)
    old, now = x509.load_pem_x509_certificate(path.read_bytes()), datetime.now(UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(old.subject)
        .issuer_name(old.issuer)
        .public_key(old.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + timedelta(seconds=begins_in_s))
        .not_valid_after(now + timedelta(seconds=ends_in_s))
    )
    for extension in old.extensions:
        builder = builder.add_extension(extension.value, critical=extension.critical)
    new = builder.sign(key, hashes.SHA256())  # type: ignore[arg-type]
    write_text(path, new.public_bytes(Encoding.PEM).decode())


@pytest.mark.faults(
    injected="a site's certificate that expires in the middle of a run, and is renewed 5 s later",
    must="the session ends with the certificate; with the new files the site goes on, without a restart",
)
async def test_a_site_whose_certificate_expires_goes_on_with_the_next(tmp_path, seen):
    async with federation_of(tmp_path, "oslo") as federation:
        federation.configure("coordinator", heartbeat_s=1)
        federation.start_coordinator()
        federation.train("oslo", seconds=1.0)
        run = await federation.submit(rounds=25)
        reissue(federation, "oslo", begins_in_s=-60, ends_in_s=LIFE_S)
        federation.start_site("oslo")
        await federation.until(lambda: "expired" in federation.log("coordinator") + federation.log("oslo"))
        before = await federation.get(run)
        await asyncio.sleep(5)
        during = await federation.get(run)
        assert before is not None
        assert during is not None
        assert len(during.rounds) <= len(before.rounds) + 1  # what was under way may end, nothing begins
        process = federation.running["oslo"]
        reissue(federation, "oslo", begins_in_s=-60, ends_in_s=86400)
        await federation.finished(run, 100)
        assert process.poll() is None
    seen(f"stood still in round {len(during.rounds)} of 25, then went on by itself")


@pytest.mark.faults(
    injected="a certificate that is not valid yet, as after a clock that ran ahead when it was made",
    must="the daemon ends at its start and says from when it is valid; later it starts",
)
async def test_a_certificate_of_tomorrow_is_told_at_the_start(tmp_path, seen):
    async with federation_of(tmp_path, "oslo") as federation:
        reissue(federation, "oslo", begins_in_s=3600, ends_in_s=86400)
        federation.start_site("oslo")
        process = federation.running["oslo"]
        await federation.until(lambda: process.poll() is not None)
        assert process.poll() != 0
        assert "valid only from" in federation.log("oslo")
        assert "is this host's clock right?" in federation.log("oslo")
        reissue(federation, "oslo", begins_in_s=-1, ends_in_s=86400)
        federation.start_coordinator()
        federation.start_site("oslo")
        await federation.attached(1)
    seen("as it should be")
