"""A view and the fake etcd that it mirrors: tests decide what pods publish, and when their leases end."""

from mesh.schema.keys import Keys
from mesh.schema.records import LOADED, LOADING, READY, CopyRecord, PodRecord
from router.state.pods import Copy
from router.state.view import View
from tests.support.fakecalls import FakePool


class World:
    """A world in which every change is one revision."""

    def __init__(self) -> None:
        self.keys = Keys("test/mesh")
        self.pools: list[FakePool] = []
        self.items: dict[bytes, bytes] = {}
        self.revision = 100
        self.view = View(self.keys, self._connect)  # type: ignore[arg-type]

    def _connect(self, address: str) -> FakePool:
        self.pools.append(FakePool(address))
        return self.pools[-1]

    def change(self, *items: tuple[bytes, bytes | None]) -> None:
        """Changes these keys in one revision. None deletes a key."""
        self.revision += 1
        for key, value in items:
            if value is None:
                self.items.pop(key, None)
            else:
                self.items[key] = value
        self.view.delta(self.revision, items)

    def snapshot(self) -> None:
        """Gives the view all keys, as after it has connected again."""
        self.view.snapshot(self.revision, list(self.items.items()))

    def pod(
        self,
        name: str,
        incarnation: str = "i",
        *,
        state: str = READY,
        capacity: int = 1 << 30,
        used: int = 0,
        **more: object,
    ) -> None:
        record = PodRecord(
            incarnation,
            f"{name}:1",
            f"{name}:2",
            state,
            capacity_bytes=capacity,
            used_bytes=used,
            **more,  # type: ignore[arg-type]
        )
        self.change((self.keys.pod(name), record.encode()))

    def copy(
        self,
        model: str,
        pod: str,
        incarnation: str = "i",
        *,
        created: int = 7,
        state: str = LOADED,
        bytes: int = 1000,
        generation: int = 0,
        version: str = "1",
    ) -> None:
        record = CopyRecord(incarnation, created, state, host_bytes=bytes, generation=generation, version=version)
        self.change((self.keys.copy(model, pod), record.encode()))

    def claim(self, model: str, pod: str, incarnation: str = "i", *, created: int = 7) -> None:
        """Writes a pod's claim on a model, which begins a load."""
        self.copy(model, pod, incarnation, created=created, state=LOADING)

    def withdraw(self, model: str, pod: str) -> None:
        self.change((self.keys.copy(model, pod), None))

    def lose(self, *pods: str) -> None:
        """Ends the leases of these pods: everything that they have published is deleted in one revision."""
        keys = [self.keys.pod(pod) for pod in pods]
        keys += [
            key for key in self.items if key.startswith(self.keys.all_copies) and self.keys.copy_of(key)[1] in pods
        ]
        self.change(*((key, None) for key in sorted(keys)))

    def forget_silently(self, *keys: bytes) -> None:
        """Deletes keys without telling the view."""
        self.revision += 1
        for key in keys:
            del self.items[key]

    def callable(self, model: str) -> list[str]:
        return [copy.pod.name for copy in self.view.copies.get(model, ())]

    def get(self, model: str, pod: str) -> Copy:
        (found,) = [copy for copy in self.view.known(model) if copy.pod.name == pod]
        return found

    def pool(self, pod: str) -> FakePool:
        found = self.view.pods[pod].pool
        assert isinstance(found, FakePool)
        return found
