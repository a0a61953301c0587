"""ModelMesh's JSON for the connection to etcd, which its installations keep in the Secret `model-serving-etcd`.

The document has the fields `endpoints` (separated by commas), `userid`, `password`, `root_prefix`, `certificate` (of
the authority, in PEM), `client_certificate` and `client_key` (in PEM), and `override_authority`. Instead of a PEM text,
the document may name a file in its folder, such as another key of the mounted Secret, by `certificate_file`,
`client_certificate_file` or `client_key_file`. The file takes precedence.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mesh.options.etcdsettings import EtcdFiles, EtcdSettings
from mesh.options.values import parse_urls

_LARGEST = 1 << 20  # bytes, Kubernetes' limit for a Secret

_TEXTS = ("endpoints", "userid", "password", "root_prefix", "override_authority")
_FILES = ("certificate", "client_certificate", "client_key")


@dataclass(frozen=True, slots=True)
class EtcdSecret:
    """The settings and the root prefix from a document."""

    settings: EtcdSettings
    root_prefix: str  # before all keys; no slash at either end


def read(path: Path) -> EtcdSecret:
    """Reads a document. Raises ValueError, with a text for the operator that contains no secrets."""
    data = _load(path)
    for name in data:
        if name.removesuffix("_file") not in (*_TEXTS, *_FILES) and name != "compose_deployment":
            raise ValueError(
                f"{path}: {name[:80]!r} is not a known field; the known ones are {', '.join((*_TEXTS, *_FILES))}"
            )
    texts = {name: _text(path, data, name) for name in _TEXTS}
    certificate, client_certificate, client_key = (_pem(path, data, name) for name in _FILES)
    endpoints = parse_urls(texts["endpoints"])
    if not endpoints:
        raise ValueError(f"{path}: `endpoints` is missing: URLs of etcd's members, separated by commas")
    if not any("://" in url for url in endpoints):  # a certificate implies TLS
        scheme = "https" if certificate is not None else "http"
        endpoints = tuple(f"{scheme}://{url}" for url in endpoints)
    if bool(client_certificate) != bool(client_key):
        raise ValueError(f"{path}: a client certificate needs its key, and a key its certificate: give both or neither")
    root_prefix = texts["root_prefix"].strip("/")
    settings = EtcdSettings(
        endpoints=endpoints,
        user=texts["userid"],
        password=texts["password"],
        ca=certificate,
        certificate=client_certificate,
        private_key=client_key,
        files=EtcdFiles(config=str(path.absolute()), root_prefix=root_prefix),
        server_name=texts["override_authority"],
    )
    return EtcdSecret(settings, root_prefix)


def _load(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            raw = file.read(_LARGEST + 1)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    if len(raw) > _LARGEST:
        raise ValueError(f"{path} has more than {_LARGEST} bytes, the limit of a Secret: name the right file")
    try:
        data = json.loads(raw)
    except (ValueError, RecursionError):
        data = None  # the parser's own text might quote a password
    if not isinstance(data, dict):
        raise ValueError(f'{path} is not a JSON object such as {{"endpoints": "https://etcd:2379"}}')
    return data


def _text(path: Path, data: dict[str, Any], name: str) -> str:
    value = data.get(name, "")
    if not isinstance(value, str):
        raise ValueError(f"{path}: `{name}` must be a string")
    return value


def _pem(path: Path, data: dict[str, Any], name: str) -> bytes | None:
    file = _text(path, data, f"{name}_file")
    if not file:
        return _text(path, data, name).encode() or None
    if "/" in file or file in (".", ".."):
        raise ValueError(f"{path}: `{name}_file` must be the name of a file in the same folder, not a path")
    try:
        return (path.parent / file).read_bytes()
    except OSError as error:
        raise ValueError(
            f"{path}: `{name}_file` names {file[:80]!r}, which cannot be read: {error.strerror}"
        ) from error
