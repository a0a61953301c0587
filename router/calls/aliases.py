"""Resolution of names: models, aliases (vmodels), and their versions.

`mm-model-id` names a model and `mm-vmodel-id` an alias. A name in a V2 message means an alias if one has that name,
otherwise a model. A call by an alias to a loaded model only reads records that the feed has delivered
(`router.state.vmodels`). If neither the feed nor the view knows a name, the router looks in etcd for a model and for an
alias of that name before it fails the call.

An alias sends its calls to its active model, or splits them over several (`placement.splits`). `diversion` decides what
to do if a model cannot serve.
"""

import random
from collections.abc import Callable, Collection, Iterable, Sequence

from mesh.schema import versions
from mesh.statuses import MeshError, Reason, shortened
from mesh.telemetry import logs
from mesh.wire import headers as names
from mesh.wire.call import Call, Header
from placement.splits import Split
from placement.vmodels.record import VModelRecord
from router.calls.aliasmeter import AliasMeter
from router.calls.routes import VMODEL, Asked, Method
from router.loads.coldstart import ColdStart
from router.state.pods import Copy
from router.state.registry import Registry
from router.state.view import View
from router.state.vmodels import Vmodels

log = logs.get(__name__)

_LISTED = 20  # versions that an error lists
_WARM = 1.0  # seconds between two requests of one worker to load a model that its alias needs
_SAID = 60.0  # seconds between two log lines about the same model of an alias


class Destination:
    """One model of an alias, with the headers for calls to it and the metrics that count them."""

    __slots__ = ("_headers", "alias", "meter", "model", "version")

    def __init__(self, alias: "Alias", model: str, version: str, meter: AliasMeter) -> None:
        self.alias = alias
        self.model = model
        self.version = version  # "": the alias names none
        self.meter = meter.of(alias.name, model)
        self._headers: dict[str, tuple[Header, ...]] = {}  # by version

    def headers(self, copy: Copy, method: Method) -> tuple[Header, ...]:
        """Returns the headers that tell the pod which model name and versions to put into the reply."""
        own = self.version or copy.record.version
        found = self._headers.get(own)
        if found is None:
            found = self._headers[own] = ((names.AS, names.named_as(self.alias.name, own)),)
        if method.describes:
            found += listed(self.alias.versions or ((own,) if own else ()))
        return found


class Alias:
    """An alias, prepared for calls. When its record changes, a new object replaces it."""

    __slots__ = ("_destinations", "_meter", "active", "mirror", "name", "record", "split", "sticky", "versions")

    def __init__(self, name: str, record: VModelRecord, meter: AliasMeter) -> None:
        self.name = name
        self.record = record
        self.versions = tuple(record.more.versions)
        self._meter = meter
        self._destinations: dict[tuple[str, str], Destination] = {}  # by model and version
        self.active = self.destination(record.active)
        weighted = any(weight > 0 for weight in record.more.weights.values())
        self.split = Split(record.more.weights) if weighted else None
        self.mirror = record.more.mirror
        self.sticky = record.more.sticky.lower().encode()

    def destination(self, model: str, version: str = "") -> Destination:
        """Returns the destination for one of the alias's models. `version` is the version that the call asks for, or ""
        if it asks for none."""
        found = self._destinations.get((model, version))
        if found is None:
            found = Destination(self, model, version or self.record.more.version_of(model), self._meter)
            self._destinations[model, version] = found
        return found

    def of_version(self, version: str) -> Destination:
        """Returns the destination that a version stands for. Raises MeshError UNKNOWN_VERSION if the alias has no such
        version."""
        model = self.record.more.versions.get(version)
        if model is None:
            raise unknown_version(self.name, version, self.versions)
        return self.destination(model, version)

    def models(self) -> Iterable[str]:
        """Returns the models for which this object has made destinations."""
        return {model for model, _ in self._destinations}


class Aliases:
    """The aliases of one worker, and the resolution of the names in its calls."""

    def __init__(
        self,
        vmodels: Vmodels,
        *,
        view: View,
        registry: Registry,
        coldstart: ColdStart,
        meter: AliasMeter,
        now: Callable[[], float],
        start: Callable[..., object],
        uniform: Callable[[], float] = random.random,
    ) -> None:
        """Makes the aliases of a worker. `now` is a clock in seconds, `start` runs a coroutine as a task under a name,
        `uniform` returns random numbers for splits."""
        self._vmodels = vmodels
        self._known = vmodels.get
        self._view = view
        self._registry = registry
        self._coldstart = coldstart
        self._meter = meter
        self._now = now
        self._start = start
        self._uniform = uniform
        self._aliases: dict[str, Alias] = {}  # those that have been called
        self._warmed: dict[str, float] = {}  # when a load was last requested, by model
        self._said: dict[tuple[str, str], float] = {}  # when a line was last logged, by alias and model
        vmodels.listen(self._changed)

    def find(self, name: str) -> Alias | None:
        """Returns the alias with that name if the feed has reported it. Does not read etcd."""
        found = self._aliases.get(name)
        if found is None:
            record = self._known(name)
            if record is not None:
                found = self._aliases[name] = Alias(name, record, self._meter)
        return found

    def destination(self, alias: Alias, call: Call, version: str) -> Destination:
        """Returns the destination of a call by an alias. If the alias names versions, `version` decides, unless it is
        "". A call without a version goes to a model of the split, if there is one. All other calls go to the active
        model. Raises MeshError UNKNOWN_VERSION if the alias has no such version."""
        if version and alias.versions:
            return alias.of_version(version)
        split = alias.split
        if split is None or version:
            return alias.active
        key = call.header(alias.sticky) if alias.sticky else None
        if key is not None:
            model = split.of(key)
        else:
            model = split.at(self._uniform())
            assert model is not None
            if model not in self._view.copies:
                model = self._instead(alias, split, model)
        assert model is not None
        return alias.destination(model)

    def settled(self, call: Call, asked: Asked) -> tuple[str, Destination | None] | None:
        """Returns the model for a call, and its destination if the call names an alias. Returns None if etcd must be
        read first (`resolve`). Raises MeshError UNKNOWN_VERSION."""
        name, kind, version = asked
        if not kind or self._known(name) is None:
            if kind == VMODEL or (version and not self._is_version(name, version)):
                return None
            return name, None
        alias = self._aliases.get(name) or self.find(name)
        assert alias is not None
        destination = self.destination(alias, call, version) if version or alias.split is not None else alias.active
        if version and not alias.versions and not self._is_version(destination.model, version):
            return None
        return destination.model, destination

    async def resolve(self, call: Call, asked: Asked) -> tuple[str, Destination | None]:
        """Returns the same as `settled`, but reads etcd if necessary. Raises MeshError."""
        found = self.settled(call, asked)
        if found is not None:
            return found
        name, kind, version = asked
        if kind == VMODEL and self.find(name) is None:
            await self.read(name)
            if self.find(name) is None:
                raise MeshError(Reason.UNKNOWN_MODEL, "vmodel not found", details={"vmodel": name[:200]})
            return await self.resolve(call, asked)
        alias = self.find(name) if kind else None
        model = name if alias is None else self.destination(alias, call, version).model
        registration = await self._registry.read(model)
        if registration is not None:
            if (own := versions.own(registration.record.path)) != version:
                raise unknown_version(name, version, (own,))
            return model, None if alias is None else alias.destination(model)
        if kind and alias is None and self.find(name) is not None:  # the read has found an alias of that name
            return await self.resolve(call, asked)
        return model, None if alias is None else alias.destination(model)  # a call to it gives the right error

    async def read(self, name: str) -> None:
        """Reads an alias from etcd. From then on, `find` returns this record or a later one. Raises MeshError
        REGISTRY_AWAY."""
        try:
            await self._registry.read(name, fresh=True)
        except MeshError as error:
            if error.reason is not Reason.INTERNAL:  # a model record that cannot be read does not matter here
                raise

    def other(self, alias: Alias, call: Call, tried: Collection[str]) -> str | None:
        """Returns the next model for a call by an alias with a split, if the models in `tried` cannot serve it. Returns
        None if no model is left."""
        split = alias.split
        assert split is not None
        key = call.header(alias.sticky) if alias.sticky else None
        model = split.at(self._uniform(), tried) if key is None else split.of(key, tried)
        return alias.active.model if model is None and alias.active.model not in tried else model

    def divert(self, destination: Destination, error: MeshError) -> None:
        """Counts a call that goes to another model of its alias because the destination's model cannot serve, for the
        reason in `error`. Logs such calls at most once a minute for each alias and model."""
        destination.meter.diverted.inc()
        said, now = (destination.alias.name, destination.model), self._now()
        if now - self._said.get(said, -_SAID) >= _SAID:
            self._said[said] = now
            log.warning(
                "a model of an alias cannot serve; its calls go to others",
                alias=destination.alias.name,
                model=destination.model,
                why=error.text,
            )

    def _instead(self, alias: Alias, split: Split, model: str) -> str:
        """Returns the model for a call if the drawn model is not loaded. If another model of the split is loaded,
        returns that model, and starts to load the drawn one."""
        missing = [one for one in split.models if one not in self._view.copies]
        other = split.at(self._uniform(), missing)
        if other is None:
            return model
        self.warm(model)
        self.divert(alias.destination(model), MeshError(Reason.UNAVAILABLE, "it is not loaded"))
        return other

    def warm(self, model: str, pause: float = _WARM) -> None:
        """Starts to load a model for later calls. Does nothing if this worker is loading the model already, or if this
        method started its load less than `pause` seconds ago."""
        now = self._now()
        if now - self._warmed.get(model, -pause) >= pause and not self._coldstart.loading(model):
            self._warmed[model] = now
            self._start(self._load(model), f"load {model}")

    async def _load(self, model: str) -> None:
        try:
            await self._coldstart.begin(model)
        except MeshError as error:
            log.info("a model of an alias cannot be loaded", model=model, why=error.text)

    def _is_version(self, model: str, version: str) -> bool:
        """Returns whether a copy in the view has that version of the model."""
        return any(copy.record.version == version for copy in self._view.copies.get(model, ()))

    def _changed(self, name: str) -> None:
        former = self._aliases.pop(name, None)
        if former is None:
            return
        record = self._vmodels.get(name)
        kept = frozenset() if record is None else record.names()
        for model in former.models():
            if model not in kept:
                self._meter.forget(name, model)
                self._warmed.pop(model, None)
                self._said.pop((name, model), None)


def added(destination: Destination | None, copy: Copy, method: Method) -> tuple[Header, ...]:
    """Returns the headers of a call that tell the pod which names to put into the reply. `destination` is None if the
    call names a model, not an alias."""
    if destination is not None:
        return destination.headers(copy, method)
    return listed((copy.record.version,) if copy.record.version else ()) if method.describes else ()


def listed(known: Sequence[str]) -> tuple[Header, ...]:
    """Returns the header with the versions that the reply must list, or no header if the versions are unknown."""
    return ((names.VERSIONS, names.listed(known)),) if known else ()


def unknown_version(name: str, version: str, known: Iterable[str]) -> MeshError:
    """Returns the error for a version that a model or an alias does not have. `known` are the versions that it has."""
    known = tuple(known)
    there = ", ".join(known[-_LISTED:]) + (f" and {len(known) - _LISTED} earlier ones" if len(known) > _LISTED else "")
    text = shortened(f"{name[:200]} has no version {version[:100]}; its versions: {there}")
    return MeshError(Reason.UNKNOWN_VERSION, text, details={"model": name[:200], "versions": there[:500]})
