"""Verbs, which are the kinds of operations, and roles, which are sets of verbs that a grant gives."""

import enum
from collections.abc import Mapping
from types import MappingProxyType


class Verb(enum.StrEnum):
    """The kind of an operation. (A `StrEnum`, because the hash of an `Enum` is computed by Python code, which adds 0.1
    us to each decision.)"""

    PUBLIC = "public"  # tells nothing about models: health
    KNOWN = "known"  # for every caller who is known
    INFER = "infer"  # calls a model
    READ = "read"  # changes nothing
    REGISTER = "register"  # changes models or their copies
    ADMIN = "admin"  # changes the mesh, keys or grants


class Role(enum.StrEnum):
    """The set of operations that a grant allows. `ALLOWS` lists the verbs of each role."""

    INFER = "infer"
    READ = "read"
    REGISTER = "register"
    ADMIN = "admin"


ALLOWS: Mapping[Role, frozenset[Verb]] = MappingProxyType(
    {
        Role.INFER: frozenset({Verb.INFER}),
        Role.READ: frozenset({Verb.READ}),
        Role.REGISTER: frozenset({Verb.READ, Verb.REGISTER}),
        Role.ADMIN: frozenset({Verb.INFER, Verb.READ, Verb.REGISTER, Verb.ADMIN}),
    }
)
"""The verbs of each role."""
