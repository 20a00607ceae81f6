"""Which TLS an HTTP port has, by the config alone: no web code is imported for a port that nobody wants."""

from fedloom_common.identity import TlsFiles, is_loopback


def http_encryption(http: str, http_tls: bool | None, tls: TlsFiles | None) -> TlsFiles | None:
    """The certificate of the HTTP port at host:port; None if it speaks in clear.

    Raises:
        ValueError: TLS is wanted, or needed off loopback, and there is no certificate.
    """
    wanted = not is_loopback(http) if http_tls is None else http_tls
    if wanted and tls is None:
        raise ValueError(
            f"http is {http}, whose TLS needs a certificate: give tls, an address such as 127.0.0.1:8443, or "
            "http_tls: false to let everybody on the way read it"
        )
    return tls if wanted else None
