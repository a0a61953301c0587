"""Errors of etcd.

Callers need to know whether etcd may have carried out a write that failed. For example, a put that timed out may still
take effect later. Only requests that never reached etcd, or that etcd refused, are reported as not ambiguous. This
module is the only one that interprets etcd's messages, which are defined in etcd's api/v3rpc/rpctypes/error.go.

Each error has two texts. `text` is for callers of the mesh. It says what is wrong and what still works, without
addresses or messages of gRPC. `detail` is for the operator. It has the request, the member and the exact message, and
appears in logs and in commands that talk to etcd directly.
"""

import grpc

from mesh.statuses import Code, MeshError, Reason


class EtcdError(MeshError):
    """The base class of all errors of etcd, and itself the error for a request that etcd would refuse again."""

    def __init__(self, detail: str, *, reason: Reason = Reason.INTERNAL, text: str = "") -> None:
        super().__init__(reason, text or detail)
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason.name}: {self.detail}"


class EtcdUnavailable(EtcdError):
    """A request that failed because etcd cannot be reached, did not answer in time, or accepts no writes now.

    `ambiguous` is True if etcd may have carried out the request, or may still do so. It is always False for reads.
    """

    def __init__(self, detail: str, *, ambiguous: bool = False, why: str = "does not answer") -> None:
        """Makes the error. `why` completes a sentence for callers that begins with "etcd"."""
        super().__init__(detail, reason=Reason.REGISTRY_AWAY, text=_away(why))
        self.ambiguous = ambiguous


class EtcdClosed(EtcdUnavailable):
    """The end of a request or stream because its client was closed."""


class EtcdReplaced(EtcdUnavailable):
    """The end of a request or stream because the client has switched to changed credentials. Another attempt uses the
    new credentials."""


class EtcdDenied(EtcdError):
    """A request that etcd refused because of the user, the password, the certificate or missing permissions.

    Callers are told that the registry is unavailable, because the fault is not theirs and only the operator can correct
    it.
    """

    def __init__(self, detail: str) -> None:
        super().__init__(detail, reason=Reason.REGISTRY_AWAY, text=_away("refuses the mesh's credentials"))


class EtcdCompacted(EtcdError):
    """A request for a revision that etcd no longer keeps. `revision` is the oldest revision that etcd keeps, or 0 if
    unknown."""

    def __init__(self, revision: int = 0) -> None:
        kept = f"revision {revision}" if revision else "a revision that it did not name"
        super().__init__(f"etcd has compacted its history up to {kept}")
        self.revision = revision


class EtcdLeaseLost(EtcdError):
    """A request that named a lease which does not exist, or no longer exists."""


def _away(why: str) -> str:
    served = "Loaded models are still served; try again, or run `mesh doctor` to find the cause"
    return f"the registry is unavailable: etcd {why}. {served}"


_UNSENT = (
    "failed to connect to all addresses",
    "connections to all backends failing",
    "empty address list",
    "DNS resolution failed",
    "Failed to connect to remote host",
    "Name resolution failed",
)
_REFUSED_FOR_NOW = ("etcdserver: no leader", "etcdserver: too many requests")
_STALE_TOKEN = ("etcdserver: invalid auth token", "revision of auth store is old", "etcdserver: user name is empty")


def code_of(error: grpc.aio.AioRpcError) -> Code:
    """Returns the status code of a failed call."""
    return Code(error.code().value[0])


def is_refused(error: grpc.aio.AioRpcError) -> bool:
    """Returns whether etcd certainly did not carry out the request, so that it may be sent again to any member."""
    details = error.details() or ""
    if code_of(error) is Code.UNAVAILABLE and any(text in details for text in _UNSENT):
        return True
    return any(text in details for text in _REFUSED_FOR_NOW)


def is_transient(error: grpc.aio.AioRpcError) -> bool:
    """Returns whether another attempt, at this or another member, may succeed."""
    return is_refused(error) or code_of(error) in (
        Code.UNAVAILABLE,
        Code.DEADLINE_EXCEEDED,
        Code.CANCELLED,
        Code.ABORTED,
        Code.UNKNOWN,  # proxies in between send it, for their own faults and for HTTP errors
    )


def is_stale_token(error: grpc.aio.AioRpcError) -> bool:
    """Returns whether etcd refused the token rather than the user."""
    return code_of(error) is Code.UNAUTHENTICATED or says_stale_token(error.details() or "")


def says_stale_token(text: str) -> bool:
    """Returns whether a text says that the token was refused. Watches are refused with a text instead of a status."""
    return any(known in text for known in _STALE_TOKEN)


def translate(error: grpc.aio.AioRpcError, what: str, *, write: bool) -> EtcdError:
    """Translates a failed call to an EtcdError. `what` names the request and the member."""
    code, details = code_of(error), error.details() or ""
    text = f"{what}: {details or code.name}"
    if is_stale_token(error) or code is Code.PERMISSION_DENIED or "authentication failed" in details:
        return EtcdDenied(text)
    if "required revision has been compacted" in details:
        return EtcdCompacted()
    if "requested lease not found" in details:
        return EtcdLeaseLost(text)
    if is_transient(error):
        return EtcdUnavailable(text, ambiguous=write and not is_refused(error), why=_why(code, details))
    if "database space exceeded" in details:
        return EtcdUnavailable(text, why="has no space left")
    if "request is too large" in details or "message larger than max" in details:
        return EtcdError(text, reason=Reason.TOO_LARGE)
    return EtcdError(text)


def _why(code: Code, details: str) -> str:
    """Returns the fault, in words that complete a sentence that begins with "etcd"."""
    if "no leader" in details:
        return "has no leader"
    if "too many requests" in details:
        return "is overloaded"
    if code is Code.DEADLINE_EXCEEDED:
        return "does not answer in time"
    return "cannot be reached" if any(text in details for text in _UNSENT) else "does not answer"
