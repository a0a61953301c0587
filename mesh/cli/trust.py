"""The command line's credentials: the authorities that it trusts, and the certificate and API key that it presents."""

import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mesh.cli.exits import CommandError, Exit

if TYPE_CHECKING:  # it takes a quarter of a second to import, which `mesh --help` should not take
    import grpc


@dataclass(frozen=True, slots=True)
class Trust:
    """The paths of PEM files, and the API key or the path of its file. Without `ca` the system's authorities are
    trusted."""

    ca: Path | None = None
    certificate: Path | None = None
    private_key: Path | None = None
    api_key_file: Path | None = None
    api_key: str = ""  # takes precedence

    def authorization(self) -> dict[str, str]:
        """Returns the header with the API key, or no header without an API key. Raises CommandError if the key cannot
        be read or sent."""
        key = self.api_key.strip()
        if key:
            key = key.splitlines()[-1].strip()  # as of a file, see below
        elif self.api_key_file is not None:
            try:
                lines = self.api_key_file.read_text().split()
            except (OSError, UnicodeDecodeError) as error:
                why = error.strerror if isinstance(error, OSError) else "it is not text"
                raise CommandError(
                    f"the API key in {self.api_key_file} cannot be read: {why}", code=Exit.USAGE
                ) from error
            if not lines:
                raise CommandError(
                    f"the API key file {self.api_key_file} is empty: write a key to it, or name another file with "
                    "--api-key-file",
                    code=Exit.USAGE,
                )
            key = lines[-1]  # while an admin key is rotated, the file has both, the newer one last
        if not key:
            return {}
        if not key.isascii() or not key.isprintable() or " " in key:
            where = "in MESH_API_KEY" if self.api_key.strip() else f"in {self.api_key_file}"
            raise CommandError(f"the API key {where} has characters that no key has: correct it", code=Exit.USAGE)
        return {"authorization": f"Bearer {key}"}

    def context(self) -> ssl.SSLContext:
        """Returns the TLS context for REST. Raises CommandError if the files cannot be used."""
        what = f"the CA certificates in {self.ca}"
        try:
            context = ssl.create_default_context(cafile=str(self.ca) if self.ca else None)
            if self.certificate is not None:
                what = f"the client certificate {self.certificate} with the key {self.private_key or 'in it'}"
                context.load_cert_chain(self.certificate, self.private_key)
        except (OSError, ValueError) as error:
            why = (isinstance(error, OSError) and error.strerror) or error
            raise CommandError(f"{what} cannot be used: {why}", code=Exit.USAGE) from error
        return context

    def credentials(self) -> "grpc.ChannelCredentials":
        """Returns the credentials for gRPC. Raises CommandError if the files cannot be used."""
        import grpc

        self.context()  # raises errors that name the files; grpc would only fail to connect
        certificate = self.certificate.read_bytes() if self.certificate else None
        key = (self.private_key or self.certificate or Path()).read_bytes() if certificate else None
        return grpc.ssl_channel_credentials(self.ca.read_bytes() if self.ca else None, key, certificate)


SYSTEM = Trust()
