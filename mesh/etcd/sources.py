"""Repeated reading of the files behind a process's etcd settings.

A mounted Secret may change while a process runs, and then contain another password, certificate or member. Either all
files are read or none, so that a certificate is never combined with the key of an earlier certificate. `rotation` finds
out whether etcd accepts the result.
"""

from dataclasses import replace
from pathlib import Path

from mesh.etcd.endpoints import check
from mesh.options import etcdsecret
from mesh.options.etcdsettings import EtcdSettings

_READINGS = 5  # attempts, if files change meanwhile


def read(known: EtcdSettings) -> EtcdSettings:
    """Reads the files of `known` again. Raises ValueError if a file cannot be read, or the settings in it are invalid.
    The text is for operators and contains no secrets."""
    for _ in range(_READINGS):
        found = _read(known)
        if _read(known) == found:
            check(found)
            return found
    raise ValueError("the files with etcd's credentials keep changing while they are read; they are read again later")


def changes(before: EtcdSettings, after: EtcdSettings) -> str:
    """Lists the settings that differ, in words."""
    names = {
        "endpoints": "endpoints",
        "user": "user",
        "password": "password",
        "ca": "authority",
        "certificate": "certificate",
        "private_key": "key",
        "server_name": "name",
    }
    return ", ".join(word for name, word in names.items() if getattr(before, name) != getattr(after, name))


def _read(known: EtcdSettings) -> EtcdSettings:
    files = known.files
    if files.config:
        document = etcdsecret.read(Path(files.config))
        if document.root_prefix != files.root_prefix:
            raise ValueError(
                f"{files.config}: `root_prefix` is {document.root_prefix!r} now. The keys of this process are under "
                f"{files.root_prefix!r} for as long as it runs: restart the process, or undo the change"
            )
        found = document.settings
        return replace(found, timeout=known.timeout, connect_timeout=known.connect_timeout)
    password = _content(files.password)
    try:
        text = known.password if password is None else password.decode().strip()
    except UnicodeDecodeError as error:  # whose text would show a part of it
        raise ValueError(f"{files.password} is not UTF-8 text: write the password to it again") from error
    return replace(
        known,
        password=text,
        ca=_content(files.ca) or known.ca,
        certificate=_content(files.certificate) or known.certificate,
        private_key=_content(files.private_key) or known.private_key,
    )


def _content(path: str) -> bytes | None:
    if not path:
        return None
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
