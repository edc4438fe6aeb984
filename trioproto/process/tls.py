"""TLS contexts for both sides (RFC 8446), from PEM files."""

import ssl


def server_context(cert: str, key: str | None, client_ca: str | None) -> ssl.SSLContext:
    """Return what a server needs to speak TLS 1.2 and later.

    Args:
        cert: file with the server's certificate, and those between it and its root.
        key: file with its private key; None if ``cert`` holds that too.
        client_ca: file with the certificates of those who may sign clients' certificates; a client without one is
            not served then. None: clients need none.

    Raises:
        OSError: if a file cannot be read, or does not hold what it should (`ssl.SSLError`).
    """
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(cert, key)
    if client_ca is not None:
        context.load_verify_locations(client_ca)
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def client_context(ca: str | None, cert: str | None, key: str | None) -> ssl.SSLContext:
    """Return what a client needs to speak TLS 1.2 and later with a server whose certificate names its host.

    Args:
        ca: file with the certificates of those who may sign the server's; None for those that the system trusts.
        cert: file with the client's own certificate, for a server that asks for one; None if it has none.
        key: file with its private key; None if ``cert`` holds that too.

    Raises:
        OSError: if a file cannot be read, or does not hold what it should (`ssl.SSLError`).
    """
    context = ssl.create_default_context(cafile=ca)
    if cert is not None:
        context.load_cert_chain(cert, key)
    return context
