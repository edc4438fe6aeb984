"""TLS contexts for both sides (RFC 8446), from PEM files."""

import os
import ssl
import stat
from pathlib import Path
from typing import Any


class ServerContext(ssl.SSLContext):
    """A server's context whose files can be loaded again while it is in use, for `wrap_bio`.

    `load_cert_chain` on a context in use replaces its certificate only if the new key is of the same kind. OpenSSL
    keeps one certificate for each kind, so after a change from ECDSA to RSA, most clients would go on to choose the old
    one. Certificates of authorities are only ever added; one that is not to be trusted any more would stay. And clients
    whose certificates such an authority signed could resume their sessions. So the files are loaded into a fresh
    context each time, and this one gives each new connection the latest of them.
    """

    _latest: ssl.SSLContext

    def load(self, cert: str, key: str | None, client_ca: str | None) -> None:
        """Use these files, as `server_context` does, for the handshakes of connections that begin from now on.

        Raises:
            OSError: as for `server_context`. Then nothing has changed.
        """
        self._latest = _load_server_context(cert, key, client_ca)

    def reload(self, cert: str, key: str | None, client_ca: str | None) -> None:
        """Do what `load` does, in a server that runs: it must not wait, as it would for somebody to write to a pipe.

        Raises:
            OSError: as for `server_context`, and for what is no file that can be read again. Then nothing has changed.
        """
        check_readable_again(cert, key, client_ca)
        self.load(cert, key, client_ca)

    def wrap_bio(self, *args: Any, **kwargs: Any) -> ssl.SSLObject:
        """Begin a connection with the files that were loaded last."""
        return self._latest.wrap_bio(*args, **kwargs)


def server_context(cert: str, key: str | None, client_ca: str | None) -> ServerContext:
    """Return what a server needs to speak TLS 1.2 and later.

    Args:
        cert: file with the server's certificate, and those between it and its root.
        key: file with its private key; None if ``cert`` holds that too.
        client_ca: file with the certificates of those who may sign clients' certificates; a client without one is
            not served then. None: clients need none.

    Raises:
        OSError: if a file cannot be read, or does not hold what it should. The text says which, and why.
    """
    context = ServerContext(ssl.PROTOCOL_TLS_SERVER)
    context.load(cert, key, client_ca)
    return context


def check_readable_again(*files: str | None) -> None:
    """Check that no file is a pipe or a device: what comes out of it comes once, and may have to be waited for.

    Raises:
        OSError: for the first one that is. One that cannot be read at all is left to whoever reads it.
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
    """Return what a client needs to speak TLS 1.2 and later with a server whose certificate names its host.

    Args:
        ca: file with the certificates of those who may sign the server's; None for those that the system trusts.
        cert: file with the client's own certificate, for a server that asks for one; None if it has none.
        key: file with its private key; None if ``cert`` holds that too.

    Raises:
        OSError: if a file cannot be read, or does not hold what it should. The text says which, and why.
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
    except OSError as error:  # which does not say of which file
        unreadable = cert if Path(cert).is_dir() or not os.access(cert, os.R_OK) else key
        raise OSError(f"cannot read {unreadable!r}: {error.strerror}") from None
    except ValueError as error:
        raise OSError(str(error)) from None


def _cert_error(cert: str, key: str, error: ssl.SSLError) -> OSError:
    """Say which file is wrong, and how, when OpenSSL has read both and could not use them."""
    if error.reason in (
        "KEY_VALUES_MISMATCH",
        "NO_CERTIFICATE_ASSIGNED",
    ):  # the latter if they are not even of one kind
        return OSError(f"the private key in {key!r} is not that of the certificate in {cert!r}")
    if not Path(cert).is_file():  # a pipe cannot be read again
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
