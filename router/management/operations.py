"""The table of management operations, which transports and permissions share.

Each route of REST and each method of gRPC names its operation here, so the meaning and the verb of an operation do not
depend on the transport.
"""

import enum
from dataclasses import dataclass


class Verb(enum.Enum):
    """The kind of an operation."""

    READ = "read"  # changes nothing
    REGISTER = "register"  # changes models or their copies
    ADMIN = "admin"  # changes the mesh


class Noun(enum.Enum):
    """The kind of thing that a request names."""

    MODEL = "model"
    MODELS = "models"  # each line of the body names one
    VMODEL = "vmodel"
    POD = "pod"
    SETTING = "setting"
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
