"""The certificate authority of a test mesh, and the certificate folders of its processes, changed as Kubernetes changes
mounted Secrets."""

import datetime
import os
import shutil
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

PEM = serialization.Encoding.PEM


class Authority:
    """An authority whose certificates have been valid for four hours."""

    def __init__(self, name: str = "authority") -> None:
        self.name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"{name} {os.urandom(3).hex()}")])
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.pem = self._sign(
            self.name, self.key.public_key(), 48, x509.BasicConstraints(ca=True, path_length=None)
        ).public_bytes(PEM)

    def _sign(
        self, name: x509.Name, key: ec.EllipticCurvePublicKey, hours: float, *extensions: x509.ExtensionType
    ) -> x509.Certificate:
        now = datetime.datetime.now(datetime.UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(self.name)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=4))
            .not_valid_after(now + datetime.timedelta(hours=hours))
        )
        for extension in extensions:
            builder = builder.add_extension(extension, critical=isinstance(extension, x509.BasicConstraints))
        return builder.sign(self.key, hashes.SHA256())

    def issue(self, *names: str, hours: float = 24, use: tuple[x509.ObjectIdentifier, ...] = ()) -> tuple[bytes, bytes]:
        """Returns a certificate and its key, both as PEM, for these names (default: mesh.internal) and these uses
        (default: any). The certificate expires `hours` from now; a negative number makes an expired certificate."""
        key = ec.generate_private_key(ec.SECP256R1())
        extensions: list[x509.ExtensionType] = [
            x509.SubjectAlternativeName([x509.DNSName(name) for name in names or ("mesh.internal",)])
        ]
        if use:
            extensions.append(x509.ExtendedKeyUsage(use))
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "a process")])
        private = key.private_bytes(PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        return self._sign(subject, key.public_key(), hours, *extensions).public_bytes(PEM), private


SERVER_ONLY = (ExtendedKeyUsageOID.SERVER_AUTH,)


class Mounted:
    """A folder as kubelet mounts a Secret: files are links through `..data`, which one rename changes."""

    def __init__(self, folder: Path, **files: bytes) -> None:
        self.path = folder
        self._number = 0
        folder.mkdir(parents=True)
        self.put(**files)

    def put(self, **files: bytes) -> None:
        """Replaces all files with these: `ca_crt` is ca.crt, `tls_crt` is tls.crt, `tls_key` is tls.key."""
        self._number += 1
        fresh = self.path / f"..{self._number}"
        fresh.mkdir()
        for key, content in files.items():
            name = key.replace("_", ".")
            (fresh / name).write_bytes(content)
            if not (self.path / name).is_symlink():
                (self.path / name).symlink_to(f"..data/{name}")
        link, data = self.path / "..new", self.path / "..data"
        old = os.readlink(data) if data.is_symlink() else ""
        link.symlink_to(fresh.name)
        os.replace(link, data)
        if old:
            shutil.rmtree(self.path / old)

    def issue(self, by: Authority, *, trust: bytes = b"", hours: float = 24) -> None:
        """Writes a new certificate of the authority, and `trust` as ca.crt, by default the authority's own
        certificate."""
        certificate, key = by.issue(hours=hours)
        self.put(ca_crt=trust or by.pem, tls_crt=certificate, tls_key=key)

    @classmethod
    def of(cls, folder: Path, by: Authority, *, trust: bytes = b"", hours: float = 24) -> "Mounted":
        """Makes a mounted folder with a new certificate of the authority, and `trust` as ca.crt, by default the
        authority's own certificate."""
        certificate, key = by.issue(hours=hours)
        return cls(folder, ca_crt=trust or by.pem, tls_crt=certificate, tls_key=key)
