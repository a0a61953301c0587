"""The copies in a pod, and the choice of the copy that a call is for.

Another pod may get the same address, and an id may be registered again for another model. A call therefore names its
copy by a token (`mesh-copy`: the agent's incarnation and the create revision of the model's record), and no copy of
another registration answers the call. An agent that sends no tokens loads copies without tokens, which are found by
their id alone.

While a registration's content is reloaded, the pod has two copies with different tokens (`mesh.schema.copytoken`).
Until the older copy is unloaded, the newer copy answers only the calls that name it. Then it also answers the calls
that name the older copy.
"""

from collections.abc import Iterator
from typing import Generic, Protocol, TypeVar

from mesh.schema import copytoken


class Addressed(Protocol):
    """The attributes of a copy by which calls find it."""

    model_id: str
    token: bytes  # b"": the copy answers any call with its id


C = TypeVar("C", bound=Addressed)


class Copies(Generic[C]):
    """All copies in the pod, by id as encoded on the wire."""

    __slots__ = ("_by_id", "_newer")

    def __init__(self) -> None:
        self._by_id: dict[bytes, C] = {}
        self._newer: dict[bytes, C] = {}  # second copies: the next generation of the same registration

    def __iter__(self) -> Iterator[C]:
        yield from self._by_id.values()
        yield from self._newer.values()

    def add(self, copy: C) -> None:
        """Adds a copy, which may be the second of its id."""
        (self._newer if copy.model_id.encode() in self._by_id else self._by_id)[copy.model_id.encode()] = copy

    def get(self, model_id: str) -> C | None:
        """Returns the copy of an id, with any token, or None. If there are two copies, returns the older one."""
        return self._by_id.get(model_id.encode())

    def all_of(self, model_id: str) -> list[C]:
        """Returns the copies of an id, at most two."""
        name = model_id.encode()
        return [copies[name] for copies in (self._by_id, self._newer) if name in copies]

    def find(self, model_id: bytes, token: bytes | None) -> C | None:
        """Returns the copy that a call is for, or None if this pod does not have it. `token` is the token that the call
        names, or None."""
        copy = self._by_id.get(model_id)
        if copy is None or not copy.token or copy.token == token:
            return copy
        newer = self._newer.get(model_id)
        if newer is not None and newer.token == token:
            return newer
        return copy if token is not None and copytoken.supersedes(copy.token, token) else None

    def remove(self, copy: C) -> None:
        """Removes a copy. A newer copy of the same id, if any, takes its place."""
        name = copy.model_id.encode()
        if self._newer.get(name) is copy:
            del self._newer[name]
        elif self._by_id.get(name) is copy:
            newer = self._newer.pop(name, None)
            if newer is not None:
                self._by_id[name] = newer
            else:
                del self._by_id[name]
