"""Facts about etcd, member by member. `etcdchecks` judges them."""

import asyncio
import time
from collections.abc import Awaitable
from dataclasses import dataclass, replace
from typing import TypeVar
from urllib.parse import urlsplit

from mesh.cli.doctor import handshake
from mesh.cli.doctor.handshake import Handshake, Identity
from mesh.etcd import Alarm, Etcd, EtcdDenied, EtcdError, EtcdMember, Status
from mesh.etcd.ranges import after_prefix
from mesh.options.etcdsettings import EtcdSettings
from mesh.schema.keys import Keys

T = TypeVar("T")

READS = 9
"""Number of linearizable reads that are timed. Each needs one round of messages among the members."""


@dataclass(frozen=True, slots=True)
class MemberFacts:
    """Facts about one endpoint."""

    endpoint: str
    answer: Handshake  # to a connection without gRPC
    status: Status | None = None
    error: str = ""  # why there is no status
    denied: bool = False  # the error is about user or password


@dataclass(frozen=True, slots=True)
class EtcdFacts:
    """Facts about etcd. A fact that could not be read is None."""

    settings: EtcdSettings
    base: str
    members: tuple[MemberFacts, ...]
    listed: tuple[EtcdMember, ...] | None = None
    alarms: tuple[Alarm, ...] | None = None
    reads_ms: tuple[float, ...] = ()
    read_error: str = ""
    denied: str = ""  # etcd's error about user or password
    owner: bytes | None = None  # the key's value; b"": there is none
    models: int | None = None
    pods: int | None = None


async def gather(settings: EtcdSettings, base: str, *, timeout: float) -> EtcdFacts:
    """Gathers all facts, each within `timeout` seconds. Raises ValueError for settings that the client refuses."""
    settings = replace(settings, timeout=timeout)
    Etcd(settings)  # checks the settings
    members = await asyncio.gather(*(_member(settings, endpoint, timeout) for endpoint in settings.endpoints))
    facts = EtcdFacts(settings, base, tuple(members))
    if not any(member.status for member in members):
        return replace(facts, denied=next((member.error for member in members if member.denied), ""))
    async with Etcd(settings) as etcd:
        reads, error, denied = await _reads(etcd, Keys(base))
        facts = replace(facts, reads_ms=reads, read_error=error, denied=denied)
        listed, alarms = await asyncio.gather(_or_none(etcd.members()), _or_none(etcd.alarms()))
        facts = replace(facts, listed=listed, alarms=alarms)
        if not reads:
            return facts
        keys = Keys(base)
        owner, models, pods = await asyncio.gather(
            _or_none(etcd.get(keys.owner)),
            _or_none(etcd.count(keys.registry, after_prefix(keys.registry))),
            _or_none(etcd.count(keys.pods, after_prefix(keys.pods))),
        )
        return replace(facts, owner=owner.value if owner else b"", models=models, pods=pods)


async def _member(settings: EtcdSettings, endpoint: str, timeout: float) -> MemberFacts:
    parts = urlsplit(endpoint)
    identity = Identity(settings.ca, settings.certificate, settings.private_key)
    answer = await handshake.ask(
        parts.hostname or "",
        parts.port or 2379,
        tls=parts.scheme == "https",
        identity=identity,
        name=settings.server_name,
        timeout=timeout,
    )
    try:
        async with Etcd(replace(settings, endpoints=(endpoint,))) as etcd:
            return MemberFacts(endpoint, answer, await etcd.status())
    except EtcdDenied as error:
        return MemberFacts(endpoint, answer, error=error.detail, denied=True)
    except EtcdError as error:
        return MemberFacts(endpoint, answer, error=error.detail)


async def _reads(etcd: Etcd, keys: Keys) -> tuple[tuple[float, ...], str, str]:
    """Returns the durations of a few reads in ms, the error that ended the reads, and the same error again if it is a
    denial of access. Each error is "" if it did not occur."""
    times: list[float] = []
    try:
        for _ in range(READS):
            began = time.perf_counter()
            await etcd.get(keys.owner)
            times.append(1000 * (time.perf_counter() - began))
    except EtcdDenied as error:
        return tuple(times), error.detail, error.detail
    except EtcdError as error:
        return tuple(times), error.detail, ""
    return tuple(times), "", ""


async def _or_none(question: Awaitable[T]) -> T | None:
    try:
        return await question
    except EtcdError:
        return None
