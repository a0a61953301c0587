"""Where everything is in etcd: one base prefix a mesh, one function a kind of key.

The layout is `<root>/<prefix>/<service>/` as the predecessor's, so that a mesh can be started on its data. Ids stand
raw in `registry/` and `vmodels/`, because that is what the predecessor and its Kubernetes controller read; in keys of
ours they are percent-encoded, so that no id is a prefix of another's range.
"""

from dataclasses import dataclass
from urllib.parse import quote, unquote

from mesh.etcd.ranges import after_prefix

TOMBSTONE = "~"
"""What stands in place of a pod in a tombstone's key. No pod's name is written so: theirs have it escaped."""


def _quote_pod(pod: str) -> bytes:
    return quote(pod, safe="").replace("~", "%7E").encode()


@dataclass(frozen=True, slots=True)
class Keys:
    """The keys of one mesh. `base` has no trailing slash, e.g. `mm/modelmesh-serving`."""

    base: str

    @property
    def registry(self) -> bytes:
        """Prefix of the model records."""
        return f"{self.base}/registry/".encode()

    @property
    def vmodels(self) -> bytes:
        """Prefix of the vmodel records."""
        return f"{self.base}/vmodels/".encode()

    @property
    def pods(self) -> bytes:
        """Prefix of the pods' presence."""
        return f"{self.base}/pods/".encode()

    @property
    def lives(self) -> bytes:
        """Prefix of the incarnations of pods whose model server may still answer. Inside `presence_range`."""
        return f"{self.base}/lives/".encode()

    @property
    def routers(self) -> bytes:
        """Prefix of the routers' presence; outside of `presence_range`."""
        return f"{self.base}/routers/".encode()

    @property
    def all_copies(self) -> bytes:
        """Prefix of every model's copies."""
        return f"{self.base}/copies/".encode()

    @property
    def config(self) -> bytes:
        """Prefix of the dynamic settings."""
        return f"{self.base}/config/".encode()

    @property
    def auth(self) -> bytes:
        """Prefix of identities and of what each may do."""
        return f"{self.base}/auth/".encode()

    @property
    def wanted(self) -> bytes:
        """Prefix of the ids of models whose number of copies was set: so that nobody has to read all records for them.
        It lies outside of `presence_range`, and holds no values."""
        return f"{self.base}/wanted/".encode()

    @property
    def recent(self) -> bytes:
        """Prefix of the list of the models that were used last; outside of `presence_range` too."""
        return f"{self.base}/recent/".encode()

    @property
    def reloads(self) -> bytes:
        """Prefix of the models whose copies move to new content; outside of `presence_range` too."""
        return f"{self.base}/reloads/".encode()

    @property
    def leader(self) -> bytes:
        """Who runs the slow loops."""
        return f"{self.base}/leader".encode()

    @property
    def owner(self) -> bytes:
        """Whose prefix this is."""
        return f"{self.base}/owner".encode()

    @property
    def presence_range(self) -> tuple[bytes, bytes]:
        """One range that holds `copies/` and `pods/` and neither `config/` nor `registry/`.

        Read and watched as one, a lease's end shows as one batch of deletions at one revision: that is how a pod that
        vanished is told from a pod that withdrew a copy. `lives/` lies inside too, for the same reason; so do `leader`
        and `owner`, which are few and ignored.
        """
        return self.all_copies, after_prefix(self.pods)

    def setting(self, name: str) -> bytes:
        """One dynamic setting."""
        return self.config + quote(name, safe="").encode()

    def setting_of(self, key: bytes) -> str:
        """The setting that a key of `config/` names; of one that no setting can have, some other name."""
        return unquote(key[len(self.config) :].decode(errors="replace"))

    def model(self, model_id: str) -> bytes:
        """The model's record."""
        return self.registry + model_id.encode()

    def vmodel(self, vmodel_id: str) -> bytes:
        """The vmodel's record."""
        return self.vmodels + vmodel_id.encode()

    def pod(self, pod: str) -> bytes:
        """The pod's presence."""
        return self.pods + quote(pod, safe="").encode()

    def life(self, pod: str, incarnation: str) -> bytes:
        """One incarnation of a pod."""
        return self.lives_of(pod) + quote(incarnation, safe="").encode()

    def lives_of(self, pod: str) -> bytes:
        """Prefix of the incarnations of one pod."""
        return self.lives + _quote_pod(pod) + b"/"

    def life_of(self, key: bytes) -> tuple[str, str]:
        """The pod and the incarnation that a key of `lives/` names."""
        pod, _, incarnation = key[len(self.lives) :].decode().partition("/")
        return unquote(pod), unquote(incarnation)

    def router(self, name: str) -> bytes:
        """The router's presence."""
        return self.routers + quote(name, safe="").encode()

    def router_of(self, key: bytes) -> str:
        """The router that a key of `routers/` names."""
        return unquote(key[len(self.routers) :].decode())

    def tombstone(self, model_id: str) -> bytes:
        """The mark of a model that was unregistered while somebody may still have answered for it. It lies among the
        model's copies, after all of them, so that whoever demands that there be no copy demands that it be gone."""
        return self.copies(model_id) + TOMBSTONE.encode()

    def copies(self, model_id: str) -> bytes:
        """Prefix of one model's copies."""
        return self.all_copies + quote(model_id, safe="").encode() + b"/"

    def copy(self, model_id: str, pod: str) -> bytes:
        """One copy."""
        return self.copies(model_id) + _quote_pod(pod)

    def model_of(self, key: bytes) -> str:
        """The id that a key of `registry/` names."""
        return key[len(self.registry) :].decode()

    def want(self, model_id: str) -> bytes:
        """That the number of this model's copies was set."""
        return self.wanted + quote(model_id, safe="").encode()

    def want_of(self, key: bytes) -> str:
        """The model that a key of `wanted/` names; of one that no model can have, some id that is not registered."""
        return unquote(key[len(self.wanted) :].decode(errors="replace"))

    def reload(self, model_id: str) -> bytes:
        """That this model's copies move to new content (`records.Reload`)."""
        return self.reloads + quote(model_id, safe="").encode()

    def reload_of(self, key: bytes) -> str:
        """The model that a key of `reloads/` names."""
        return unquote(key[len(self.reloads) :].decode())

    def recent_piece(self, number: int) -> bytes:
        """One piece of that list, the latest first."""
        return self.recent + b"%06d" % number

    def pod_of(self, key: bytes) -> str:
        """The pod that a key of `pods/` names."""
        return unquote(key[len(self.pods) :].decode())

    def copy_of(self, key: bytes) -> tuple[str, str]:
        """The model id and the pod that a key of `copies/` names; TOMBSTONE in place of the pod for a tombstone."""
        model, _, pod = key[len(self.all_copies) :].decode().partition("/")
        return unquote(model), unquote(pod)
