"""Keys in etcd: one base prefix for each mesh, one function for each kind of key.

The layout is `<root>/<prefix>/<service>/` as in ModelMesh, so that a mesh can be started on ModelMesh's
data. Ids are literal in `registry/` and `vmodels/`, because ModelMesh and its Kubernetes controller read them
that way. In Mesh's own keys they are percent-encoded, so the keys of one id never fall into the range of another.
"""

from dataclasses import dataclass
from urllib.parse import quote, unquote

from mesh.etcd.ranges import after_prefix

TOMBSTONE = "~"
"""Placeholder for the pod in a tombstone's key. No pod has this name, because pods' keys escape it."""


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
        """Prefix of the routers' presence; outside `presence_range`."""
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
        """Prefix of API keys and grants."""
        return f"{self.base}/auth/".encode()

    @property
    def auth_keys(self) -> bytes:
        """Prefix of the records of API keys; inside `auth`."""
        return f"{self.base}/auth/keys/".encode()

    @property
    def auth_grants(self) -> bytes:
        """Prefix of the records of grants; inside `auth`."""
        return f"{self.base}/auth/grants/".encode()

    @property
    def wanted(self) -> bytes:
        """Prefix of the ids of models whose number of copies was set, by which these models are found without reading
        all records. It is outside `presence_range`, and its keys have no values."""
        return f"{self.base}/wanted/".encode()

    @property
    def recent(self) -> bytes:
        """Prefix of the list of the most recently used models; also outside `presence_range`."""
        return f"{self.base}/recent/".encode()

    @property
    def reloads(self) -> bytes:
        """Prefix of the models that are being reloaded; also outside `presence_range`."""
        return f"{self.base}/reloads/".encode()

    @property
    def leader(self) -> bytes:
        """The key that the leading router holds."""
        return f"{self.base}/leader".encode()

    @property
    def owner(self) -> bytes:
        """The key of the prefix's owner."""
        return f"{self.base}/owner".encode()

    @property
    def presence_range(self) -> tuple[bytes, bytes]:
        """The range that holds `copies/` and `pods/` but not `config/` and `registry/`.

        Within one range, the end of a lease appears as one batch of deletions at one revision. This distinguishes a pod
        that disappeared from a pod that unloaded a copy. `lives/` is inside for the same reason. `leader` and `owner`
        are inside too; readers ignore these two keys.
        """
        return self.all_copies, after_prefix(self.pods)

    def setting(self, name: str) -> bytes:
        """Returns the key of a dynamic setting."""
        return self.config + quote(name, safe="").encode()

    def setting_of(self, key: bytes) -> str:
        """Returns the setting of a key in `config/`. For a key that no setting can have, returns a name that no setting
        has."""
        return unquote(key[len(self.config) :].decode(errors="replace"))

    def auth_key(self, name: str) -> bytes:
        """Returns the key of an API key's record."""
        return self.auth_keys + quote(name, safe="").encode()

    def auth_grant(self, name: str) -> bytes:
        """Returns the key of a grant's record."""
        return self.auth_grants + quote(name, safe="").encode()

    def model(self, model_id: str) -> bytes:
        """Returns the key of a model's record."""
        return self.registry + model_id.encode()

    def vmodel(self, vmodel_id: str) -> bytes:
        """Returns the key of a vmodel's record."""
        return self.vmodels + vmodel_id.encode()

    def pod(self, pod: str) -> bytes:
        """Returns the key of a pod's presence."""
        return self.pods + quote(pod, safe="").encode()

    def life(self, pod: str, incarnation: str) -> bytes:
        """Returns the key of one incarnation of a pod."""
        return self.lives_of(pod) + quote(incarnation, safe="").encode()

    def lives_of(self, pod: str) -> bytes:
        """Returns the prefix of one pod's incarnations."""
        return self.lives + _quote_pod(pod) + b"/"

    def life_of(self, key: bytes) -> tuple[str, str]:
        """Returns the pod and the incarnation of a key in `lives/`."""
        pod, _, incarnation = key[len(self.lives) :].decode().partition("/")
        return unquote(pod), unquote(incarnation)

    def router(self, name: str) -> bytes:
        """Returns the key of a router's presence."""
        return self.routers + quote(name, safe="").encode()

    def router_of(self, key: bytes) -> str:
        """Returns the router of a key in `routers/`."""
        return unquote(key[len(self.routers) :].decode())

    def tombstone(self, model_id: str) -> bytes:
        """Returns the key of a tombstone, which marks a model that was unregistered while a pod might still answer for
        it. The key sorts after all copies of the model, within their prefix, so a check that the model has no copies
        also checks that it has no tombstone."""
        return self.copies(model_id) + TOMBSTONE.encode()

    def copies(self, model_id: str) -> bytes:
        """Returns the prefix of one model's copies."""
        return self.all_copies + quote(model_id, safe="").encode() + b"/"

    def copy(self, model_id: str, pod: str) -> bytes:
        """Returns the key of one copy."""
        return self.copies(model_id) + _quote_pod(pod)

    def model_of(self, key: bytes) -> str:
        """Returns the id of a key in `registry/`."""
        return key[len(self.registry) :].decode()

    def want(self, model_id: str) -> bytes:
        """Returns the key that marks a model whose number of copies was set."""
        return self.wanted + quote(model_id, safe="").encode()

    def want_of(self, key: bytes) -> str:
        """Returns the model of a key in `wanted/`. For a key that no model can have, returns an id that is not
        registered."""
        return unquote(key[len(self.wanted) :].decode(errors="replace"))

    def reload(self, model_id: str) -> bytes:
        """Returns the key that marks a model as being reloaded (`records.Reload`)."""
        return self.reloads + quote(model_id, safe="").encode()

    def reload_of(self, key: bytes) -> str:
        """Returns the model of a key in `reloads/`."""
        return unquote(key[len(self.reloads) :].decode())

    def recent_piece(self, number: int) -> bytes:
        """Returns the key of one piece of the list of recently used models, the latest first."""
        return self.recent + b"%06d" % number

    def pod_of(self, key: bytes) -> str:
        """Returns the pod of a key in `pods/`."""
        return unquote(key[len(self.pods) :].decode())

    def copy_of(self, key: bytes) -> tuple[str, str]:
        """Returns the model id and the pod of a key in `copies/`. The pod of a tombstone is TOMBSTONE."""
        model, _, pod = key[len(self.all_copies) :].decode().partition("/")
        return unquote(model), unquote(pod)
