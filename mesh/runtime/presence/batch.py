"""One transaction that writes keys of this pod's copies, and possibly the pod's record.

The transaction succeeds only if its guard holds: `pods/<pod>` is under this agent's lease, or unchanged since it was
read. Thus no key of the pod is in etcd without the pod's presence, and a process that is resumed after it lost its
place cannot overwrite its successor's keys. If the transaction fails, its responses say why.
"""

from collections.abc import Mapping

from mesh.etcd import Compare, Op, TxnResult, created, delete_op, get_op, get_range_op, put_op
from mesh.schema.keys import Keys
from mesh.schema.records import CopyRecord, PodRecord


class Batch:
    """The operations of one transaction."""

    def __init__(self, keys: Keys, pod: str, guard: Compare, lease: int) -> None:
        self._keys = keys
        self._pod = pod
        self._lease = lease
        self.compares = [guard]
        self.success: list[Op] = []
        self.failure: list[Op] = [get_op(keys.pod(pod))]
        self.keyed: list[str] = []  # models whose keys exist if it succeeds
        self._checked: list[tuple[str, int]] = []

    def add_copies(self, checked: Mapping[str, bool], wanted: Mapping[str, CopyRecord]) -> None:
        """Adds a write or deletion of the key of each model in `checked`. If the model's value there is True, the copy
        must still be of the current registration."""
        for model_id, check in checked.items():
            key, record = self._keys.copy(model_id, self._pod), wanted.get(model_id)
            if record is None:
                self.success.append(delete_op(key))
                continue
            self.success.append(put_op(key, record.encode(), self._lease))
            self.keyed.append(model_id)
            if check:
                model = self._keys.model(model_id)
                self.compares.append(created(model, "==", record.create_revision))
                self.failure.append(get_range_op(model, model + b"\0", keys_only=True))
                self._checked.append((model_id, record.create_revision))

    def add_pod(self, record: PodRecord) -> None:
        """Adds a write of the pod's own record."""
        self.success.append(put_op(self._keys.pod(self._pod), record.encode(), self._lease))

    def unguarded(self, result: TxnResult) -> bool:
        """Returns whether the transaction failed because `pods/<pod>` is no longer under the lease."""
        pods = result.responses[0]
        return not (isinstance(pods, tuple) and pods and pods[0].lease == self._lease)

    def outdated(self, result: TxnResult) -> list[str]:
        """Returns the models that made the transaction fail, because they were registered again or unregistered."""
        return [
            model_id
            for (model_id, revision), found in zip(self._checked, result.responses[1:], strict=True)
            if not (isinstance(found, tuple) and found and found[0].create_revision == revision)
        ]
