"""The choice of the next model for a call by alias whose model cannot serve.

If a model of a split cannot serve, its calls go to the alias's other models instead, each of which is tried once. If
the model of an alias is not registered, the alias may have been moved, so its record is read again, once. Error texts
are ModelMesh's.

A call is diverted only if it has not reached a model. If its server is lost, or its model returns an error, the caller
gets that error.
"""

from mesh.statuses import MeshError, Reason
from mesh.wire.call import Call
from router.calls.aliases import Aliases, Destination
from router.calls.routes import VMODEL, Asked

REASONS = frozenset(
    {
        *(Reason.UNKNOWN_MODEL, Reason.LOAD_FAILED, Reason.CONTENT_CHANGED, Reason.NOT_FETCHED, Reason.INTERNAL),
        *(Reason.NOWHERE, Reason.NO_ROOM, Reason.OVERLOADED, Reason.NOT_IN_TIME, Reason.QUARANTINED),
        *(Reason.REGISTRY_AWAY, Reason.FORMER_LIFE, Reason.UNAVAILABLE),
    }
)
"""Reasons of errors with which a call has not reached a model."""


class Diversion:
    """The diversions of one call. `destination` is the call's current destination, or None if the call names a
    model."""

    __slots__ = ("_aliases", "_asked", "_call", "_reread", "_tried", "destination")

    def __init__(self, aliases: Aliases, call: Call, asked: Asked, destination: Destination | None) -> None:
        self._aliases = aliases
        self._call = call
        self._asked = asked
        self._tried: set[str] = set()
        self._reread = False
        self.destination = destination

    @property
    def model(self) -> str:
        """The model that the call is currently sent to."""
        return self._asked[0] if self.destination is None else self.destination.model

    def others(self) -> bool:
        """Returns whether the alias has a model that has not been tried."""
        return self._other() is not None

    def at_once(self, error: MeshError) -> bool:
        """Switches the call to another model, without reading etcd. Returns False if no other model is known. Raises
        MeshError UNKNOWN_VERSION."""
        destination = self.destination
        if destination is None:  # no model has the name; the read that has shown this may have found an alias
            alias = self._aliases.find(self._asked[0]) if error.reason is Reason.UNKNOWN_MODEL else None
            if alias is None:
                return False
            self.destination = self._aliases.destination(alias, self._call, self._asked[2])
            return True
        other = self._other()
        if other is None:
            return False
        self._aliases.divert(destination, error)
        self._tried.add(destination.model)
        self.destination = other
        return True

    def must_read(self, error: MeshError) -> bool:
        """Returns whether the alias must be read again, with `read`, before the call fails."""
        return self.destination is not None and error.reason is Reason.UNKNOWN_MODEL

    async def read(self) -> None:
        """Reads the alias again, and switches the call to the model that the alias now names. Raises MeshError if the
        call cannot be switched."""
        assert self.destination is not None
        name, kind, version = self._asked
        gone = self.destination.model
        text = f"Target model {gone[:200]} of vmodel {name[:200]} not found"
        missing = MeshError(Reason.INTERNAL, text, details={"vmodel": name[:200], "model": gone[:200]})
        if self._reread:
            raise missing
        self._reread = True
        await self._aliases.read(name)
        alias = self._aliases.find(name)
        if alias is None:
            if kind == VMODEL:
                raise MeshError(Reason.UNKNOWN_MODEL, "vmodel not found", details={"vmodel": name[:200]})
            self.destination = None  # if there is a model of that name, the name now means the model
            return
        if version and alias.versions:
            destination = alias.of_version(version)
        else:
            record = alias.record
            destination = alias.destination(record.active if record.active != gone else record.target)
        if destination.model == gone:
            raise missing
        self.destination = destination

    def _other(self) -> Destination | None:
        destination = self.destination
        if destination is None or self._asked[2]:  # a version that was asked for has one model
            return None
        alias = self._aliases.find(self._asked[0])
        if alias is None or alias.split is None:
            return None
        model = self._aliases.other(alias, self._call, {*self._tried, destination.model})
        return None if model is None else alias.destination(model)
