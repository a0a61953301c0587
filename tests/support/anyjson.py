"""JSON as any other program may have written it to etcd: the attributes that Mesh reads, with any value that JSON
allows.

Python's parser also accepts NaN, arbitrarily large numbers and lone surrogates.
"""

import json
from typing import Any

from hypothesis import strategies as st


class Raw(str):
    """A number in the spelling that the JSON text must have."""


NAMES = sorted(
    {"type", "mPath", "encKey", "lu", "refs", "failedIn", "fails", "mesh", "hostBytes", "minCopies", "pinned", "killed"}
    | {"incarnation", "data", "control", "state", "protocol", "labels", "capacity", "used", "oldest", "up", "disk"}
    | {"created", "host", "device", "age", "msg", "kind", "since"}
)
"""Attributes of all of Mesh's records."""

_NUMBERS = ["1e999", "-1e999", "NaN", "Infinity", "1e30", "9" * 5000, "-1", "0.5", str(2**63)]
_LEAVES = [st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.sampled_from(["\ud800", ""])]

json_values = st.recursive(
    st.one_of(*_LEAVES, st.sampled_from(_NUMBERS).map(Raw)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES) | st.text(), inner, max_size=4),
    max_leaves=8,
)


def as_json(value: Any) -> str:
    """Returns the JSON of a value. `Raw` numbers keep their spelling."""
    if isinstance(value, Raw):
        return value
    if isinstance(value, dict):
        return "{" + ",".join(f"{json.dumps(name)}:{as_json(one)}" for name, one in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(as_json, value)) + "]"
    return json.dumps(value)
