"""The translation of an object store's refusal into an error that says what to do.

obstore has few classes of errors, and names the cause only in a text that quotes requests, signatures and bodies. So
that text is never passed on: it is searched for the HTTP status, the store's own code and some names of Rust errors,
and these are translated. Those names were found by provoking each error on real servers.
"""

import re

import obstore.exceptions

from puller import tunnel
from puller.errors import PullError, PullErrorKind
from puller.objects_client import Target

_STATUS = re.compile(r"non-2xx status code: (\d{3})|status: (\d{3})\b")
_CODE = re.compile(r"<Code>([A-Za-z0-9]{2,60})</Code>|\"?code\"?: ?\"([A-Za-z0-9]{2,60})\"")

_CREDENTIALS = frozenset(
    {
        *("SignatureDoesNotMatch", "InvalidAccessKeyId", "InvalidToken", "ExpiredToken", "TokenRefreshRequired"),
        *("InvalidSecurity", "NotSignedUp", "XAdminUserNotFound", "InvalidClientTokenId", "AuthFailure"),
        *("AuthenticationFailed", "AuthorizationFailure", "NoAuthenticationInformation", "InvalidAuthenticationInfo"),
        *("KeyBasedAuthenticationNotPermitted", "AuthenticationRequired", "Unauthorized", "InvalidCredentials"),
    }
)
_NO_BUCKET = frozenset(
    {"NoSuchBucket", "ContainerNotFound", "ContainerDisabled", "InvalidBucketName", "AllAccessDisabled"}
)
_BUSY = frozenset({"SlowDown", "ServerBusy", "RequestLimitExceeded", "TooManyRequests", "Throttling"})
_FAILING = frozenset({"ServiceUnavailable", "OperationTimedOut", "InternalError", "RequestTimeout"})
_REGION = frozenset(
    {"AuthorizationHeaderMalformed", "PermanentRedirect", "TemporaryRedirect", "IllegalLocationConstraintException"}
)
# Sources of tokens, and the beginnings of obstore's errors about them.
_IDENTITY = re.compile(
    r"169\.254\.|metadata\.google\.internal|fd00:ec2|[/.]sts\.|login\.microsoftonline|oauth2|token request|"
    r"MissingCredentials|InstanceCredentials|TokenRequest|assume.?role|federated",
    re.IGNORECASE,
)


def code_of(error: BaseException) -> tuple[int, str]:
    """Returns the HTTP status and the store's own code, or 0 and "" if the text has none."""
    text = str(error)
    status, code = _STATUS.search(text), _CODE.search(text)
    return (
        int(status[1] or status[2]) if status else 0,
        (code[1] or code[2] or "") if code else "",
    )


def translated(error: BaseException, shown: str, target: Target) -> PullError:
    """Returns the error for people. It must be raised `from None`: a traceback would show the text of its cause."""
    status, _ = code_of(error)
    # A refusal by Mesh's own proxy looks like a failure of the store.
    if status in (0, 403, 502) and (trouble := target.grant.trouble()) is not None:
        kind, why = trouble.kind, trouble.text
    elif (refused := tunnel.refusal_in(str(error))) is not None:
        kind, why = refused
    else:
        kind, why = _meaning(error, target)
    at = f" at {target.endpoint}" if target.endpoint not in shown else ""
    return PullError(kind, f"{shown}{at}: {why}")


def _meaning(error: BaseException, target: Target) -> tuple[PullErrorKind, str]:
    text = str(error)
    status, code = code_of(error)
    if isinstance(error, obstore.exceptions.PreconditionError):
        return PullErrorKind.CHANGED, "the object changed while it was fetched; try again"
    if code in _NO_BUCKET:
        return (
            PullErrorKind.NO_BUCKET,
            f"there is no such bucket or container ({code}); check its name, and the endpoint",
        )
    if code in _CREDENTIALS:
        return PullErrorKind.CREDENTIALS, f"the store does not accept the credentials ({code}); {_whose(target)}"
    if code in _REGION or status in (301, 307) or "redirect without LOCATION" in text:
        return (
            PullErrorKind.BAD_REQUEST,
            f"the bucket is probably in another region ({code or status or 'redirect'}); "
            'set "region" in the storage secret',
        )
    if code == "RequestTimeTooSkewed":
        return PullErrorKind.CREDENTIALS, (
            "the clocks of the store and of this pod's machine differ too much (RequestTimeTooSkewed); synchronise them"
        )
    if not status and "uri" in text and _IDENTITY.search(text):
        why = "the pod's own identity is not available; give credentials in the storage secret"
        return PullErrorKind.CREDENTIALS, f'{why}, or "identity": "anonymous" for a public bucket'
    if isinstance(error, FileNotFoundError) or status == 404:
        return PullErrorKind.NOT_FOUND, "nothing is there; check the path of the registration"
    if isinstance(error, obstore.exceptions.UnauthenticatedError) or status == 401:
        return PullErrorKind.CREDENTIALS, f"the store does not recognise the caller (401); {_whose(target)}"
    if isinstance(error, obstore.exceptions.PermissionDeniedError) or status == 403:
        return PullErrorKind.FORBIDDEN, (
            f"access is forbidden ({code or 403}), or the object does not exist; {_whose(target)}"
        )
    if code in _BUSY or status == 429:
        return PullErrorKind.BUSY, f"the store has too many requests now ({code or status}); try again later"
    if code in _FAILING or status == 408 or status >= 500:
        return PullErrorKind.UNREACHABLE, f"the store failed ({code or status}); check it, and try again"
    if status:
        return (
            PullErrorKind.BAD_REQUEST,
            f"the store does not accept the request ({code or status}); check the path, and the settings of the store",
        )
    return _connection(text)


def _connection(text: str) -> tuple[PullErrorKind, str]:
    if "dns error" in text:
        return (
            PullErrorKind.DNS,
            "the name of its host cannot be resolved; check its spelling, and the pods' name server",
        )
    if "InvalidCertificate" in text or "certificate" in text.lower():
        return PullErrorKind.TLS, (
            'the store\'s certificate is not trusted; give its authority as "certificate" in the storage secret'
        )
    if "InvalidMessage" in text or "HandshakeFailure" in text or "AlertReceived" in text:
        return PullErrorKind.TLS, "there is no TLS connection; check that the store speaks TLS on that port"
    # Checked before the others, because a body that a timeout ended is reported as incomplete too.
    if "TimedOut" in text or "kind: Timeout" in text or "timed out" in text:
        return PullErrorKind.TIMEOUT, (
            "the store did not answer in time; check that it is up and reachable from the pods"
        )
    if "ConnectionRefused" in text:
        return PullErrorKind.UNREACHABLE, (
            "the connection is refused; check that the server is up and reachable from the pods"
        )
    if "IncompleteBody" in text or "IncompleteMessage" in text or "UnexpectedEof" in text:
        return PullErrorKind.INTEGRITY, (
            "the answer ended before all of it had arrived; check the store, and the network"
        )
    if "Connect" in text and "ConnectionReset" not in text:
        return PullErrorKind.UNREACHABLE, ("the store cannot be connected to; check that it is reachable from the pods")
    if "path segment" in text or "parse path" in text:
        name = re.search(r'Path "(.{1,200}?)" contain', text)
        which = f" ({name[1]!r})" if name else ""
        return (
            PullErrorKind.BAD_REQUEST,
            f'an object has a key with "//", "." or ".."{which}, which no file can have; rename the object',
        )
    return PullErrorKind.UNREACHABLE, "the connection was lost; check the network between the store and the pods"


def _whose(target: Target) -> str:
    if target.anonymous:
        return "no credentials were given: name them in the storage secret"
    return "check the credentials in the storage secret, or the role of the pod"
