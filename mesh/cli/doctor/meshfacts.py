"""Facts about a mesh that any client can read from its endpoint. `meshchecks` judges them."""

import asyncio
import itertools
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from mesh.cli import aliasview
from mesh.cli.client import Client
from mesh.cli.doctor import handshake
from mesh.cli.doctor.handshake import Handshake, Identity
from mesh.cli.exits import CommandError
from mesh.cli.trust import Trust
from mesh.schema.modelstatus import VModelStatus

MOST = 200
"""Largest number of failing models that are kept: a person reads only a few, and a thousand usually have the same
reason."""


@dataclass(frozen=True, slots=True)
class Troubled:
    """A model that cannot be loaded."""

    model: str
    quarantined: bool
    why: str


@dataclass(slots=True)
class Registered:
    """The registered models that were read in time."""

    models: int = 0
    types: Counter[str] = field(default_factory=Counter)
    keys: Counter[str] = field(default_factory=Counter)  # storage keys that models name
    example: dict[str, str] = field(default_factory=dict)  # one model for each of these keys and types
    troubled: list[Troubled] = field(default_factory=list)
    quarantined: int = 0
    failing: int = 0
    whole: bool = True  # all were read

    def add(self, model: Mapping[str, Any]) -> None:
        """Counts a model from the mesh's list."""
        name, kind = str(model.get("id", "")), str(model.get("type", ""))
        self.models += 1
        self.types[kind] += 1
        self.example.setdefault(f"type {kind}", name)
        if key := storage_key(str(model.get("key") or "")):
            self.keys[key] += 1
            self.example.setdefault(f"key {key}", name)
        errors = model.get("errors") or ()
        if errors:
            quarantined = bool(model.get("quarantined"))
            self.quarantined += quarantined
            self.failing += not quarantined
            if len(self.troubled) < MOST:
                self.troubled.append(Troubled(name, quarantined, str(errors[0])))


@dataclass(frozen=True, slots=True)
class StuckMove:
    """An alias that has not moved to its target."""

    alias: str
    target: str
    why: str


@dataclass(slots=True)
class Aliases:
    """The aliases that were read in time."""

    count: int = 0
    moving: int = 0
    stuck: list[StuckMove] = field(default_factory=list)
    named: dict[str, str] = field(default_factory=dict)  # models that are not registered: an alias and role of each

    def add(self, alias: Mapping[str, Any]) -> None:
        """Counts an alias from the mesh's list."""
        self.count += 1
        name = str(alias.get("id", ""))
        self.moving += alias.get("status") == VModelStatus.TRANSITIONING
        if alias.get("status") == VModelStatus.TRANSITION_FAILED:
            self.stuck.append(StuckMove(name, str(alias.get("target", "")), aliasview.why(alias)))
        for model, roles in aliasview.roles(alias).items():
            self.named.setdefault(model, f"{name} ({', '.join(roles)})")


@dataclass(frozen=True, slots=True)
class MeshFacts:
    """Facts about a mesh. A fact that could not be read is None."""

    endpoint: str
    answer: Handshake  # to a connection step by step
    error: str = ""  # why the mesh does not answer
    reason: str = ""  # the name of the Reason that the mesh gave for it, if any
    stats: Mapping[str, Any] | None = None
    pods: tuple[Mapping[str, Any], ...] | None = None
    settings: Mapping[str, str] | None = None
    registered: Registered | None = None
    aliases: Aliases | None = None
    registry_error: str = ""


async def gather(endpoint: str, trust: Trust, *, timeout: float, reading: float) -> MeshFacts:
    """Gathers all facts, each within `timeout` seconds, and the list of models within `reading` seconds."""
    parts = urlsplit(endpoint)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    answer = await handshake.ask(
        parts.hostname or "", port, tls=parts.scheme == "https", identity=_identity(trust), timeout=timeout
    )
    try:
        async with Client(endpoint, timeout=timeout, trust=trust) as client:
            stats = await client.get("/mesh/v1/stats")
            pods = tuple((await client.get("/mesh/v1/pods")).get("pods") or ())
            facts = MeshFacts(endpoint, answer, stats=stats, pods=pods)
            registered, aliases = Registered(), Aliases()
            try:
                settings = (await client.get("/mesh/v1/settings")).get("settings") or {}
                await _read(client, registered, aliases, reading)
            except CommandError as error:
                return MeshFacts(endpoint, answer, stats=stats, pods=pods, registry_error=error.text)
    except CommandError as error:
        return MeshFacts(endpoint, answer, error=error.text, reason=error.reason)
    return MeshFacts(
        facts.endpoint,
        facts.answer,
        stats=facts.stats,
        pods=facts.pods,
        settings=settings,
        registered=registered,
        aliases=aliases,
    )


async def _read(client: Client, registered: Registered, aliases: Aliases, seconds: float) -> None:
    """Reads the aliases, then the models, so that a model registered meanwhile is not reported as missing."""
    try:
        async with asyncio.timeout(seconds):
            async for alias in aliasview.listed(client):
                aliases.add(alias)
            async for model in client.models():
                registered.add(model)
                aliases.named.pop(str(model.get("id", "")), None)
    except TimeoutError:
        registered.whole = False


def _identity(trust: Trust) -> Identity:
    """Reads the TLS files. Leaves out files that cannot be read, because the client reports these with a better
    error."""
    files = (trust.ca, trust.certificate, trust.private_key or trust.certificate)
    ca, certificate, key = (_bytes(path) for path in files)
    return Identity(ca, certificate, key)


def _bytes(path: Path | None) -> bytes | None:
    try:
        return path.read_bytes() if path is not None else None
    except OSError:
        return None


def storage_key(key: str) -> str:
    """Returns the key of the storage Secret that a registration names, or "" if the registration names none."""
    try:
        document = json.loads(key) if key.startswith("{") else None
    except (ValueError, RecursionError):
        return ""
    named = document.get("storage_key") if isinstance(document, dict) else None
    return named if isinstance(named, str) else ""


def stored_keys(folder: Path) -> frozenset[str]:
    """Returns the keys of a storage Secret that is mounted as a folder. Raises OSError."""
    found = (path.name for path in folder.iterdir() if not path.name.startswith(".") and path.is_file())
    return frozenset(itertools.islice(found, 10_000))
