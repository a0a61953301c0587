"""The kinds of model servers that a pod can start on this machine, and what the others lack."""

from mesh.modelservers import environments, kinds, machines, torchserve


def missing(kind: str) -> str:
    """Returns why a server cannot be started here, and what to do, or "" if it can."""
    if kinds.KINDS[kind].found:
        return torchserve.missing()
    if not kinds.KINDS[kind].installs:
        return f"Mesh cannot start {kind}: start it yourself, and name it with --server in a pod of `mesh runtime`"
    if environments.installed(kind) is None:
        return f"{kind} is not installed: run `mesh servers install {kind}`"
    return machines.lacks(kind)
