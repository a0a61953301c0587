"""The owner of a prefix in etcd, so that two meshes never share one by mistake.

Each installation has an id, on Kubernetes its namespace and release. The first process writes it, with the version of
the schema; a process of another installation does not start. A mesh without an id, such as a mesh on one machine or on
ModelMesh's data, claims nothing.
"""

import json

from mesh.etcd import Etcd, absent, get_op, put_op
from mesh.schema.keys import Keys
from mesh.telemetry import logs

log = logs.get(__name__)

SCHEMA = 1
"""Version of the keys and records that this build writes."""


class OwnedByAnother(Exception):
    """The error for a prefix that belongs, or may belong, to another mesh. The text says what to do."""


def record(install_id: str, schema: int = SCHEMA) -> bytes:
    """Returns the value of the owner's key."""
    return json.dumps({"install": install_id, "schema": schema or SCHEMA}, separators=(",", ":")).encode()


async def claim(etcd: Etcd, keys: Keys, install_id: str) -> None:
    """Claims the prefix for this installation, or checks that it already owns the prefix. Does nothing if `install_id`
    is empty. Raises OwnedByAnother and EtcdError."""
    if not install_id:
        return
    ours = record(install_id)
    result = await etcd.txn([absent(keys.owner)], [put_op(keys.owner, ours)], [get_op(keys.owner)])
    if result.succeeded:
        log.info("claimed the prefix in etcd", base=keys.base, install=install_id)
        return
    (response,) = result.responses
    value = response[0].value if isinstance(response, tuple) and response else b""
    try:
        found = json.loads(value)
        install, schema = str(found["install"]), int(found["schema"])
    except (ValueError, ArithmeticError, KeyError, TypeError) as error:
        raise OwnedByAnother(
            f"the key {keys.owner.decode()} in etcd cannot be read, so the owner of this prefix is unknown: "
            f"read it with etcdctl. Unless another mesh uses this prefix, run `mesh prefix transfer --to {install_id}`"
        ) from error
    if install != install_id:
        raise OwnedByAnother(
            f"the prefix {keys.base} in etcd belongs to the mesh {install!r}, and this is {install_id!r}: give this "
            f"one another root prefix or base, or, if {install!r} is gone, hand its models over to this one "
            f"(`mesh prefix transfer --to {install_id}`) or remove them (`mesh prefix remove`)"
        )
    if schema > SCHEMA:
        raise OwnedByAnother(
            f"the keys under {keys.base} in etcd are of version {schema}, but this build only knows version {SCHEMA}: "
            "use a newer build"
        )
