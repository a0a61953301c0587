"""The table of operations, for transports and permissions.

Each route of REST and each method of gRPC names its operation here, so the meaning and the verb of an operation do not
depend on the transport.
"""

import enum
from dataclasses import dataclass

from mesh.access.verbs import Verb


class Noun(enum.Enum):
    """The kind of thing that a request names."""

    MODEL = "model"
    MODELS = "models"  # each line of the body names one
    VMODEL = "vmodel"
    POD = "pod"
    SETTING = "setting"
    KEY = "key"
    GRANT = "grant"
    MESH = "mesh"  # no name: the whole mesh


@dataclass(frozen=True, slots=True)
class Operation:
    """One operation."""

    name: str
    verb: Verb
    noun: Noun


REGISTER = Operation("register", Verb.REGISTER, Noun.MODEL)
IMPORT = Operation("import", Verb.REGISTER, Noun.MODELS)
UNREGISTER = Operation("unregister", Verb.REGISTER, Noun.MODEL)
UNREGISTER_MANY = Operation("unregister-many", Verb.REGISTER, Noun.MODELS)
LIMIT = Operation("limit", Verb.REGISTER, Noun.MODEL)
LOAD = Operation("load", Verb.REGISTER, Noun.MODEL)
RELEASE = Operation("release", Verb.REGISTER, Noun.MODEL)
RELOAD = Operation("reload", Verb.REGISTER, Noun.MODEL)
STATUS = Operation("status", Verb.READ, Noun.MODEL)
EXPLAIN = Operation("explain", Verb.READ, Noun.MODEL)
LIST = Operation("list", Verb.READ, Noun.MESH)
PODS = Operation("pods", Verb.READ, Noun.MESH)
POD = Operation("pod", Verb.READ, Noun.POD)
QUESTIONS = Operation("questions", Verb.READ, Noun.POD)
FORGET_POD = Operation("forget-pod", Verb.ADMIN, Noun.POD)
ROUTERS = Operation("routers", Verb.READ, Noun.MESH)
STATISTICS = Operation("statistics", Verb.READ, Noun.MESH)
SETTINGS = Operation("settings", Verb.READ, Noun.MESH)
SET = Operation("set", Verb.ADMIN, Noun.SETTING)
SET_VMODEL = Operation("set-vmodel", Verb.REGISTER, Noun.VMODEL)
DELETE_VMODEL = Operation("delete-vmodel", Verb.REGISTER, Noun.VMODEL)
LIST_VMODELS = Operation("list-vmodels", Verb.READ, Noun.MESH)
VMODEL_STATUS = Operation("vmodel-status", Verb.READ, Noun.VMODEL)
KEYS = Operation("keys", Verb.ADMIN, Noun.MESH)
CREATE_KEY = Operation("create-key", Verb.ADMIN, Noun.KEY)
ROTATE_KEY = Operation("rotate-key", Verb.ADMIN, Noun.KEY)
REVOKE_KEY = Operation("revoke-key", Verb.ADMIN, Noun.KEY)
GRANTS = Operation("grants", Verb.ADMIN, Noun.MESH)
PUT_GRANT = Operation("put-grant", Verb.ADMIN, Noun.GRANT)
REMOVE_GRANT = Operation("remove-grant", Verb.ADMIN, Noun.GRANT)
APPLY_GRANTS = Operation("apply-grants", Verb.ADMIN, Noun.MESH)
WHO = Operation("who", Verb.KNOWN, Noun.MESH)

INFER = Operation("infer", Verb.INFER, Noun.MODEL)
SERVER = Operation("server", Verb.KNOWN, Noun.MESH)
HEALTH = Operation("health", Verb.PUBLIC, Noun.MESH)
METRICS = Operation("metrics", Verb.READ, Noun.MESH)
