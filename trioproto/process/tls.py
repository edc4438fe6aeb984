"""TLS contexts for both sides (RFC 8446), from PEM files."""

import os
import ssl
import stat
from pathlib import Path
from typing import Any


class ServerContext(ssl.SSLContext):
    """A server's context, for `wrap_bio`, whose files can be reloaded while it is in use.

    `load_cert_chain` on a context in use replaces its certificate only if the new key is of the same type. OpenSSL
    keeps one certificate for each type, so after a change from ECDSA to RSA, most clients would still choose the old
    one. CA certificates can only be added: one that is no longer trusted would remain, and clients with certificates
    from that CA could resume their sessions. So the files are loaded into a new context each time, and `wrap_bio` uses
    the latest one.
    """

    _latest: ssl.SSLContext

    def load(self, cert: str, key: str | None, client_ca: str | None) -> None:
        """Use these files, as `server_context` does, for handshakes from now on.

        Raises:
            OSError: as for `server_context`. Then nothing changes.
        """
        self._latest = _load_server_context(cert, key, client_ca)

    def reload(self, cert: str, key: str | None, client_ca: str | None) -> None:
        """Do the same as `load`, in a running server, which must not block: so pipes are refused.

        Raises:
            OSError: as for `server_context`, and for a pipe or a device. Then nothing changes.
        """
        check_readable_again(cert, key, client_ca)
        self.load(cert, key, client_ca)

    def wrap_bio(self, *args: Any, **kwargs: Any) -> ssl.SSLObject:
        """Start a connection with the files that were loaded last."""
        return self._latest.wrap_bio(*args, **kwargs)


def server_context(cert: str, key: str | None, client_ca: str | None) -> ServerContext:
    """Return a server's context for TLS 1.2 and later.

    Args:
        cert: file with the server's certificate and intermediate certificates.
        key: file with its private key; None if ``cert`` contains it, too.
        client_ca: file with CA certificates. Clients must then present a certificate signed by one of them. None:
            clients need no certificate.

    Raises:
        OSError: if a file cannot be read or used. The text says which, and why.
    """
    context = ServerContext(ssl.PROTOCOL_TLS_SERVER)
    context.load(cert, key, client_ca)
    return context


def check_readable_again(*files: str | None) -> None:
    """Check that no file is a pipe or a device, which can be read only once, and may block.

    Raises:
        OSError: for the first one that is. Files that cannot be read are not reported here.
    """
    for file in files:
        if file is not None and _is_pipe_or_device(file):
            raise OSError(f"{file!r} is a pipe or a device: only a file can be read again")


def _is_pipe_or_device(file: str) -> bool:
    try:
        mode = Path(file).stat().st_mode
    except OSError:
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def _load_server_context(cert: str, key: str | None, client_ca: str | None) -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.options |= ssl.OP_NO_RENEGOTIATION  # RFC 9325, section 3.5
    _load_cert(context, cert, key)
    if client_ca is not None:
        try:
            context.load_verify_locations(client_ca)
        except OSError as error:
            raise _certificates_error(client_ca, error) from None
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def client_context(ca: str | None, cert: str | None, key: str | None) -> ssl.SSLContext:
    """Return a client's context for TLS 1.2 and later. The server's certificate must match its host name.

    Args:
        ca: file with trusted CA certificates; None for those that the system trusts.
        cert: file with the client's own certificate, for servers that require one; None if it has none.
        key: file with its private key; None if ``cert`` contains it, too.

    Raises:
        OSError: if a file cannot be read or used. The text says which, and why.
    """
    try:
        context = ssl.create_default_context(cafile=ca)
    except OSError as error:
        raise _certificates_error(str(ca), error) from None
    context.options |= ssl.OP_NO_RENEGOTIATION
    if cert is not None:
        _load_cert(context, cert, key)
    return context


def _load_cert(context: ssl.SSLContext, cert: str, key: str | None) -> None:
    key = cert if key is None else key

    def refuse() -> str:
        raise ValueError(f"the private key in {key!r} is encrypted: decrypt it with openssl pkey")

    try:
        # Without `refuse`, OpenSSL would ask for the key's passphrase on the terminal.
        context.load_cert_chain(cert, key, refuse)
    except ssl.SSLError as error:
        raise _cert_error(cert, key, error) from None
    except OSError as error:  # it does not say which file
        unreadable = cert if Path(cert).is_dir() or not os.access(cert, os.R_OK) else key
        raise OSError(f"cannot read {unreadable!r}: {error.strerror}") from None
    except ValueError as error:
        raise OSError(str(error)) from None


def _cert_error(cert: str, key: str, error: ssl.SSLError) -> OSError:
    """Say what is wrong with which file, when OpenSSL could read both but not use them."""
    if error.reason in (
        "KEY_VALUES_MISMATCH",
        "NO_CERTIFICATE_ASSIGNED",
    ):  # the latter if their types differ
        return OSError(f"the private key in {key!r} is not that of the certificate in {cert!r}")
    if not Path(cert).is_file():  # a pipe can be read only once
        return OSError(
            f"cannot use the certificate in {cert!r} or the private key in {key!r}: both must be in PEM form"
        )
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cert)
    except OSError as cert_error:
        return _certificates_error(cert, cert_error)
    return OSError(f"cannot use the private key in {key!r}: {error.reason or 'it has none in PEM form'}")


def _certificates_error(file: str, error: OSError) -> OSError:
    """Say why there are no certificates in ``file``."""
    if isinstance(error, ssl.SSLError):
        return OSError(f"{file!r} has no certificate in PEM form")
    return OSError(f"cannot read {file!r}: {error.strerror}")
