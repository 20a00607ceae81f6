"""What the doctor says of certificates that cannot be used: what helps, not what does not."""

from datetime import datetime, timedelta
from pathlib import Path

import pytest

from fedloom_common import authority
from fedloom_common.authority import Authority
from fedloom_common.doctor.credentials import credential
from fedloom_common.doctor.findings import Finding
from fedloom_common.identity import Role, TlsFiles


def told_of(folder: Path, monkeypatch: pytest.MonkeyPatch, *, made_hence: timedelta) -> list[Finding]:
    """Findings on a certificate of one day that was made at another time than now."""
    ca = Authority.create(folder / "ca", "fed.test")

    class Then(datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime.now(tz) + made_hence

    with monkeypatch.context() as patch:
        patch.setattr(authority, "datetime", Then)
        ca.issue(Role.SITE, "ward-a", days=1).save(folder / "own.crt", folder / "own.key")
    tls = TlsFiles(ca=folder / "ca/ca.crt", certificate=folder / "own.crt", key=folder / "own.key")
    return list(credential(tls, Role.SITE))


def test_an_expired_certificate_is_to_be_renewed_and_is_told_once(tmp_path, monkeypatch) -> None:
    [told] = told_of(tmp_path, monkeypatch, made_hence=timedelta(days=-3))
    assert "expired" in told.told
    assert "fedloom provision renew site NAME" in told.advice


def test_a_certificate_of_tomorrow_asks_for_the_clock(tmp_path, monkeypatch) -> None:
    [told] = told_of(tmp_path, monkeypatch, made_hence=timedelta(days=3))
    assert "valid only from" in told.told
    assert "clock" in told.advice


def test_a_certificate_that_ends_soon_names_the_command(tmp_path, monkeypatch) -> None:
    soon = [told for told in told_of(tmp_path, monkeypatch, made_hence=timedelta()) if told.advice]
    assert [told.advice for told in soon] == [
        "have a new one made by `fedloom provision renew site NAME`, and copy it and its key here"
    ]
