"""The lives of pods and the tombstones of models in etcd. The fence needs them; calls do not."""

from router.state.published import LifeSaid, TombstoneSaid

Life = tuple[str, str]
"""A pod and its incarnation."""


class Lives:
    """The lives and tombstones that exist. `mesh.schema.lives` defines the records."""

    def __init__(self) -> None:
        self.standing: dict[Life, bytes] = {}
        """The lives of pods, with the values of their keys."""
        self.ended: dict[Life, int] = {}
        """The revisions at which the presence of those lives ended, as far as this process has seen the end."""
        self.tombstones: set[str] = set()
        """The models that were unregistered while a pod might still answer for them."""

    def clear(self) -> None:
        """Forgets everything before a snapshot, because a pod may have come back and been cut off again unnoticed."""
        self.standing.clear()
        self.ended.clear()
        self.tombstones.clear()

    def take(self, said: LifeSaid | TombstoneSaid) -> None:
        """Notes a change of a key in etcd."""
        if isinstance(said, TombstoneSaid):
            (self.tombstones.add if said.stands else self.tombstones.discard)(said.model)
            return
        life = (said.pod, said.incarnation)
        if said.value is None:
            self.standing.pop(life, None)
            self.ended.pop(life, None)
        else:
            self.standing[life] = said.value

    def present(self, pod: str, incarnation: str) -> None:
        """Notes that a pod has published itself in the given life."""
        self.ended.pop((pod, incarnation), None)

    def gone(self, pod: str, incarnation: str, revision: int) -> None:
        """Notes the revision at which a pod's presence ended."""
        if (pod, incarnation) in self.standing:
            self.ended[pod, incarnation] = revision
