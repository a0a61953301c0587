"""Frozen records of models, pods and copies in etcd.

A model's record is ModelMesh's JSON (attributes at their default are left out, and unknown ones survive a
rewrite), with Mesh's additions under the single attribute `mesh`. Records of pods and copies are Mesh's own. Nothing
here reads a clock or does I/O. An invalid record raises `ValueError`; readers of a range skip it and log that.
"""

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from mesh.options.values import parse_address
from mesh.schema import copytoken
from mesh.schema.jsonfields import BAD, integer, read_object, text_of, why, write_object
from placement import blame
from placement.blame import Blame
from placement.copies import UNLIMITED, CopyLimits
from placement.failures import FailureKind

PROTOCOL = 1
"""Version of the protocol between router and agent in this build, which also understands the previous one."""

SPOKEN = (PROTOCOL - 1, PROTOCOL)
"""Lowest and highest version that pods of this build publish, so that routers of the previous version can load models
in these pods."""

MAX_ID_BYTES = 1024
"""Maximum length of an id. It occurs in headers, and in etcd keys, where percent-encoding can triple its size."""

_LEGACY_TYPE = "NLCLASSIFIER"  # the type of ModelMesh's oldest records, which name none


def check_id(model_id: str, what: str = "model") -> str:
    """Returns the id if it is valid. Raises ValueError with a text for the caller."""
    if not model_id:
        raise ValueError(f"must provide non-empty {what}Id")
    try:
        size = len(model_id.encode())
    except UnicodeEncodeError:  # lone surrogates
        size = 0
    if not size or "\0" in model_id:
        raise ValueError(
            f"{what} id has characters that a key cannot hold (NUL, or half of a surrogate pair): choose another"
        )
    if size > MAX_ID_BYTES:
        raise ValueError(f"{what} id is longer than {MAX_ID_BYTES} bytes: choose a shorter one")
    return model_id


_PLAIN = re.compile(r"[\x21-\x7e]{1,512}")
"""A string that headers can carry unchanged."""


def _plain(value: Any) -> str:
    text = str(value)
    if _PLAIN.fullmatch(text) is None:
        raise ValueError(f"{text[:100]!r} cannot be sent in a header")
    return text


def _address(value: Any) -> str:
    text = _plain(value)
    if not text.startswith("unix:"):
        parse_address(text)
    return text


@dataclass(frozen=True, slots=True)
class Failure:
    """A failed load, as recorded in the registry."""

    pod: str
    at_ms: int  # epoch; ModelMesh's records require times
    text: str
    kind: FailureKind = FailureKind.LASTING
    since_ms: int = 0  # epoch: start of the unbroken series of failures; 0: this one
    asked_ms: int = 0  # pause that the store asked for
    digest: str = ""  # digest of the files that cannot be loaded
    secrets: str = ""  # the version of the storage secret that the pod pulled with (`PodRecord.secrets`)

    @classmethod
    def decode(cls, pod: str, at: Any, more: Any) -> "Failure":
        """Decodes the parts under `failedIn` and `fails`."""
        more = more or {}
        return cls(
            pod,
            integer(at),
            text_of(more.get("msg", "")),
            FailureKind.named(text_of(more.get("kind", ""))),
            integer(more.get("since", 0)),
            integer(more.get("asked", 0)),
            text_of(more.get("digest", "")),
            text_of(more.get("secrets", "")),
        )

    def encode(self) -> dict[str, Any]:
        """Encodes the part under `fails`; attributes at their default are left out."""
        kind = "" if self.kind is FailureKind.LASTING else self.kind.value
        since = 0 if self.since_ms == self.at_ms else self.since_ms
        more = {"msg": self.text, "kind": kind, "since": since, "asked": self.asked_ms}
        more |= {"digest": self.digest, "secrets": self.secrets}
        return {name: value for name, value in more.items() if value}


@dataclass(frozen=True, slots=True)
class ModelRecord:
    """The record of a registration."""

    type: str
    path: str = ""
    key: str = ""
    last_used_ms: int = 0  # epoch, coarse
    failures: tuple[Failure, ...] = ()  # newest first
    refs: int = 0  # vmodels that name it in any role
    auto_delete: bool = False  # unregistered once no vmodel names it any longer
    host_bytes: int = 0  # measured by an earlier load; 0: never
    device_bytes: int = 0
    load_ms: int = 0  # duration of the last load
    sha256: str = ""  # hex, of the model's file, if the registration names it: pulled files are checked against it
    digest: str = ""  # hex, of the content of all copies of this generation, computed by its first load
    digest_ms: int = 0  # epoch, of that load
    generation: int = 0  # number of reloads
    changed: str = ""  # hex, the digest of other content that a later load found and refused
    changed_ms: int = 0  # epoch, of that load
    limits: CopyLimits = UNLIMITED  # of its copies, if set for the model
    killed: tuple[str, ...] = ()  # one text for each server that died with this model loading or running
    blames: tuple[Blame, ...] = ()  # the same deaths for `placement.blame`; none in records of older versions
    guilty: str = ""  # reason for its quarantine; empty: none
    other: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))  # unknown attributes
    other_mesh: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))  # likewise, inside `mesh`

    _KNOWN = frozenset({"type", "mPath", "encKey", "lu", "failedIn", "fails", "refs", "autoDel", "mesh"})
    _KNOWN_MESH = frozenset(
        {
            *("hostBytes", "deviceBytes", "loadMs", "sha256", "digest", "digestAt", "generation"),
            *("changed", "changedAt"),
            *("minCopies", "maxCopies", "pinned", "killed", "blames", "guilty"),
        }
    )

    @property
    def quarantined(self) -> bool:
        """True if the model has killed model servers too often. It is then not loaded until it is released or
        registered again."""
        return bool(self.guilty) or (len(self.killed) >= 2 and not self.blames)

    def quarantine(self, model_id: str) -> str:
        """Returns the error text for callers of a quarantined model."""
        why, history = self.guilty or "servers died of it", "; ".join(self.killed)
        way_out = f"Release it (`mesh release {model_id[:200]}`) or register it again"
        return f"model {model_id[:200]} is quarantined because {why}: {history}. {way_out}"

    def with_blame(self, one: Blame, line: str) -> "ModelRecord":
        """Returns the record with the death of a model server that the model may have caused. `line` is the text for
        people. Drops expired deaths, and the oldest deaths beyond a limit."""
        if line in self.killed:  # the same death: an earlier write was of unknown outcome
            return self
        alive = blame.alive(self.blames, one.at_ms)
        blames = (*self.blames[len(self.blames) - len(alive) :], one)[-blame.KEPT :]
        killed = (*self.killed[max(0, len(self.killed) - len(alive)) :], line)[-blame.KEPT :]
        guilty = self.guilty or blame.quarantine(blames, one.at_ms)
        return replace(self, blames=blames, killed=killed, guilty=guilty)

    def absolved(self) -> "ModelRecord":
        """Returns the record without deaths, quarantine and failures."""
        return replace(self, killed=(), blames=(), guilty="", failures=())

    def refuses(self, now_ms: int) -> frozenset[str]:
        """Returns the digests, in hex, of requests that are not sent to the model, because a model server has recently
        died while running them."""
        return blame.refused(self.blames, now_ms) if self.blames else frozenset()

    def same_registration(self, asked: "ModelRecord") -> bool:
        """Returns whether `asked` is the same registration. If `asked` has no `sha256`, that makes no difference,
        because some ways of registering have no place for it. Limits, which are changed in place, and the results of
        loads make no difference either."""
        if asked.sha256 not in ("", self.sha256):
            return False
        return (self.type, self.path, self.key) == (asked.type, asked.path, asked.key)

    def differences(self, asked: "ModelRecord") -> tuple[str, ...]:
        """Returns the names of the attributes that make `asked` a different registration."""
        names = [name for name in ("type", "path", "key") if getattr(self, name) != getattr(asked, name)]
        return (*names, *(["sha256"] if asked.sha256 not in ("", self.sha256) else []))

    def contradiction(self, digest: str) -> str:
        """Returns the error text for content that is not loaded because its digest differs from this registration's."""
        when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self.digest_ms / 1000))
        return (
            f"its content has changed: this registration was first loaded at {when} with the digest {self.digest}, and "
            f"the path now has content with {digest}. Run `mesh reload` to move all copies to the new content, or "
            "register it under another id"
        )

    def reloaded(self) -> "ModelRecord":
        """Returns the record of the next generation, without the digest of the old content. The first load determines
        the new content."""
        fresh = replace(self.absolved(), digest="", digest_ms=0, changed="", changed_ms=0)
        return replace(fresh, generation=self.generation + 1)

    def recent_failures(self, now_ms: int, expiry_ms: int) -> tuple[Failure, ...]:
        """Returns the failed loads that have not expired."""
        return tuple(failure for failure in self.failures if now_ms - failure.at_ms < expiry_ms)

    def with_failure(self, failure: Failure, now_ms: int, expiry_ms: int) -> "ModelRecord":
        """Returns the record with a failure added. Keeps the latest failure of each pod, and drops expired ones."""
        recent = self.recent_failures(now_ms, expiry_ms)
        since = min([f.since_ms or f.at_ms for f in recent] + [failure.at_ms])
        kept = (f for f in recent if f.pod != failure.pod)
        return replace(
            self,
            failures=tuple(sorted((replace(failure, since_ms=since), *kept), key=lambda f: -f.at_ms)),
        )

    @classmethod
    def decode(cls, value: bytes) -> "ModelRecord":
        """Decodes the record from JSON. Raises ValueError for anything else."""
        data = read_object(value)
        mesh = data.get("mesh") or {}
        try:
            texts = data.get("fails") or {}
            failures = [Failure.decode(pod, at, texts.get(pod)) for pod, at in (data.get("failedIn") or {}).items()]
            return cls(
                type=text_of(data.get("type", _LEGACY_TYPE)),
                path=text_of(data.get("mPath", "")),
                key=text_of(data.get("encKey", "")),
                last_used_ms=integer(data.get("lu", 0)),
                failures=tuple(sorted(failures, key=lambda f: -f.at_ms)),
                refs=integer(data.get("refs", 0)),
                auto_delete=data.get("autoDel") is True,
                host_bytes=integer(mesh.get("hostBytes", 0)),
                device_bytes=integer(mesh.get("deviceBytes", 0)),
                load_ms=integer(mesh.get("loadMs", 0)),
                sha256=text_of(mesh.get("sha256", "")),
                digest=text_of(mesh.get("digest", "")),
                digest_ms=integer(mesh.get("digestAt", 0)),
                generation=integer(mesh.get("generation", 0)),
                changed=text_of(mesh.get("changed", "")),
                changed_ms=integer(mesh.get("changedAt", 0)),
                limits=CopyLimits(
                    None if mesh.get("minCopies") is None else integer(mesh["minCopies"]),
                    None if mesh.get("maxCopies") is None else integer(mesh["maxCopies"]),
                    None if mesh.get("pinned") is None else bool(mesh["pinned"]),
                ),
                killed=tuple(text_of(text) for text in mesh.get("killed", ())),
                blames=tuple(_blame(one) for one in mesh.get("blames", ())),
                guilty=text_of(mesh.get("guilty", "")),
                other=MappingProxyType({k: v for k, v in data.items() if k not in cls._KNOWN}),
                other_mesh=MappingProxyType({k: v for k, v in mesh.items() if k not in cls._KNOWN_MESH}),
            )
        except BAD as error:
            raise ValueError(why(error)) from error

    def encode(self) -> bytes:
        """Encodes the record as JSON."""
        mesh: dict[str, Any] = dict(self.other_mesh)
        for name, number in (
            ("hostBytes", self.host_bytes),
            ("deviceBytes", self.device_bytes),
            ("loadMs", self.load_ms),
            ("digestAt", self.digest_ms),
            ("generation", self.generation),
            ("changedAt", self.changed_ms),
        ):
            if number:
                mesh[name] = number
        for name, text in (("sha256", self.sha256), ("digest", self.digest), ("changed", self.changed)):
            if text:
                mesh[name] = text
        for name, limit in (
            ("minCopies", self.limits.minimum),
            ("maxCopies", self.limits.maximum),
            ("pinned", self.limits.pinned),
        ):
            if limit is not None:
                mesh[name] = limit
        if self.killed:
            mesh["killed"] = list(self.killed)
        if self.blames:
            mesh["blames"] = [[one.pod, one.at_ms, one.sure, *one.digests] for one in self.blames]
        if self.guilty:
            mesh["guilty"] = self.guilty
        data: dict[str, Any] = {"type": self.type}
        for name, value in (("mPath", self.path), ("encKey", self.key), ("lu", self.last_used_ms), ("refs", self.refs)):
            if value:
                data[name] = value
        if self.auto_delete:
            data["autoDel"] = True
        if self.failures:
            data["failedIn"] = {failure.pod: failure.at_ms for failure in self.failures}
            data["fails"] = {failure.pod: more for failure in self.failures if (more := failure.encode())}
        if mesh:
            data["mesh"] = mesh
        data.update(self.other)
        return write_object(data)


READY = "ready"
LEAVING = "leaving"  # draining: the pod gets no loads, and its copies are withdrawn one by one


@dataclass(frozen=True, slots=True)
class PodRecord:
    """A pod's presence, under its lease."""

    incarnation: str
    data_address: str  # host:port, gRPC over HTTP/1.1
    control_address: str  # host:port, gRPC
    state: str = READY
    protocol: tuple[int, int] = SPOKEN  # lowest and highest version
    labels: tuple[str, ...] = ()
    zone: str = ""
    capacity_bytes: int = 0
    used_bytes: int = 0
    device_capacity_bytes: int = 0  # device memory; 0: no device
    device_used_bytes: int = 0
    oldest_idle_ms: int = 0  # time since the last use of the next victim; 0: the pod is empty
    copies: int = 0
    loads_in_progress: int = 0
    loading_threads: int = 1
    rate: int = 0  # calls per minute
    probe_address: str = ""
    age_ms: int = 0  # since the pod started, coarse
    disk: str = ""  # the models whose files are on its disk, an `idset`
    secrets: str = ""  # the version of its storage secret; "": none
    token: str = ""  # required by its control port; "": none
    oldest_unused: bool = False  # the next victim was never called: its idle time dates from its load
    types: tuple[str, ...] = ()  # of models that its server takes; none: any
    observed_bytes: int = 0  # host memory that the models of a foreign server take, as seen from outside, coarse
    factor: float = 0.0  # by which the books count their sizes; 0: the server is ours
    unobserved: str = ""  # why a foreign server's memory is not observed

    @classmethod
    def decode(cls, value: bytes) -> "PodRecord":
        """Decodes the record from JSON. Raises ValueError for anything else."""
        data = read_object(value)
        try:
            low, high = data.get("protocol", (PROTOCOL, PROTOCOL))
            return cls(
                incarnation=_plain(data["incarnation"]),
                data_address=_address(data["data"]),
                control_address=text_of(data["control"]),
                state=text_of(data.get("state", READY)),
                protocol=(integer(low), integer(high)),
                labels=tuple(text_of(label) for label in data.get("labels", ())),
                zone=text_of(data.get("zone", "")),
                capacity_bytes=integer(data.get("capacity", 0)),
                used_bytes=integer(data.get("used", 0)),
                device_capacity_bytes=integer(data.get("deviceCapacity", 0)),
                device_used_bytes=integer(data.get("deviceUsed", 0)),
                oldest_idle_ms=integer(data.get("oldest", 0)),
                oldest_unused=bool(data.get("unused", False)),
                copies=integer(data.get("copies", 0)),
                loads_in_progress=integer(data.get("loading", 0)),
                loading_threads=integer(data.get("threads", 1)),
                rate=integer(data.get("rate", 0)),
                probe_address=text_of(data.get("probe", "")),
                age_ms=integer(data.get("up", 0)),
                disk=text_of(data.get("disk", "")),
                secrets=text_of(data.get("secrets", "")),
                token=text_of(data.get("token", "")),
                types=tuple(text_of(one) for one in data.get("types", ())),
                observed_bytes=integer(data.get("observed", 0)),
                factor=float(data.get("factor", 0.0)),
                unobserved=text_of(data.get("unobserved", "")),
            )
        except BAD as error:
            raise ValueError(why(error)) from error

    def encode(self) -> bytes:
        """Encodes the record as JSON."""
        device = {"deviceCapacity": self.device_capacity_bytes, "deviceUsed": self.device_used_bytes}
        return write_object(
            {
                "incarnation": self.incarnation,
                "data": self.data_address,
                "control": self.control_address,
                "state": self.state,
                "protocol": list(self.protocol),
                "labels": list(self.labels),
                "zone": self.zone,
                "capacity": self.capacity_bytes,
                "used": self.used_bytes,
                **(device if self.device_capacity_bytes else {}),
                "oldest": self.oldest_idle_ms,
                **({"unused": True} if self.oldest_unused else {}),
                "copies": self.copies,
                "loading": self.loads_in_progress,
                "threads": self.loading_threads,
                "rate": self.rate,
                "probe": self.probe_address,
                "up": self.age_ms,
                "disk": self.disk,
                **({"secrets": self.secrets} if self.secrets else {}),
                **({"token": self.token} if self.token else {}),
                **({"types": list(self.types)} if self.types else {}),
                **({"observed": self.observed_bytes} if self.observed_bytes else {}),
                **({"factor": self.factor} if self.factor else {}),
                **({"unobserved": self.unobserved} if self.unobserved else {}),
            }
        )


def _blame(found: Any) -> Blame:
    pod, at, sure, *digests = found
    return Blame(text_of(pod), int(at), "", bool(sure), tuple(text_of(digest) for digest in digests))


LOADING = "loading"
LOADED = "loaded"


@dataclass(frozen=True, slots=True)
class CopyRecord:
    """One model in one pod, under the pod's lease."""

    incarnation: str
    create_revision: int  # create revision of its registration
    state: str  # LOADING or LOADED
    host_bytes: int = 0
    device_bytes: int = 0
    age_ms: int = 0  # since its last use, when this was written
    type: str = ""  # the model's
    generation: int = 0  # generation of the registration's content
    digest: str = ""  # hex, digest of the files that it was loaded from
    since_ms: int = 0  # epoch, start of this state; 0: unknown
    blamed: bool = False  # servers have died in calls of the model, and its record lists the requests that are refused
    version: str = ""  # the model's own version (`mesh.schema.versions`); "": its agent is older and does not report it

    @property
    def token(self) -> bytes:
        """The value of the header `mesh-copy`, which lets a call reach only this copy."""
        return copytoken.make(self.incarnation, self.create_revision, self.generation)

    @classmethod
    def decode(cls, value: bytes) -> "CopyRecord":
        """Decodes the record from JSON. Raises ValueError for anything else."""
        data = read_object(value)
        try:
            return cls(
                incarnation=_plain(data["incarnation"]),
                create_revision=integer(data["created"]),
                state=text_of(data["state"]),
                host_bytes=integer(data.get("host", 0)),
                device_bytes=integer(data.get("device", 0)),
                age_ms=integer(data.get("age", 0)),
                type=text_of(data.get("type", "")),
                generation=integer(data.get("generation", 0)),
                digest=text_of(data.get("digest", "")),
                since_ms=integer(data.get("since", 0)),
                blamed=data.get("blamed") is True,
                version=text_of(data.get("version", "")),
            )
        except BAD as error:
            raise ValueError(why(error)) from error

    def encode(self) -> bytes:
        """Encodes the record as JSON."""
        return write_object(
            {
                "incarnation": self.incarnation,
                "created": self.create_revision,
                "state": self.state,
                "host": self.host_bytes,
                "device": self.device_bytes,
                "age": self.age_ms,
                "type": self.type,
                **({"generation": self.generation} if self.generation else {}),
                **({"digest": self.digest} if self.digest else {}),
                **({"since": self.since_ms} if self.since_ms else {}),
                **({"blamed": True} if self.blamed else {}),
                **({"version": self.version} if self.version else {}),
            }
        )


@dataclass(frozen=True, slots=True)
class Reload:
    """The record of a reload: the move of a model's copies to new content."""

    generation: int  # the generation that they move to
    why: str = ""  # reason why the last attempt failed

    @classmethod
    def decode(cls, value: bytes) -> "Reload":
        """Decodes the record from JSON. Raises ValueError for anything else."""
        data = read_object(value)
        try:
            return cls(integer(data["generation"]), text_of(data.get("why", "")))
        except BAD as error:
            raise ValueError(why(error)) from error

    def encode(self) -> bytes:
        """Encodes the record as JSON."""
        return write_object({"generation": self.generation, **({"why": self.why} if self.why else {})})
