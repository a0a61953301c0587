"""Access control of REST: each route names its operation, and the guard decides on it before the route's handler runs.

`ask` checks every request of the aiohttp application, by the name in the path, decoded as the handlers decode it. For a
list, that name is the prefix. If a body names further models, its handler calls `may` for these. An unknown path
requires a known caller, as an unknown method does.

The dispatcher checks inference calls again. The check in this module refuses a call before its body is read.
"""

from collections.abc import Awaitable, Callable, Iterable, Sequence
from http import HTTPStatus
from urllib.parse import unquote

from aiohttp import web

from mesh.access import patterns
from mesh.access.principals import Principal
from mesh.access.verbs import Verb
from mesh.statuses import MeshError
from mesh.wire.call import Header
from mesh.wire.headers import AUTHORIZATION, CLIENT_CERTIFICATE, PEER
from router.access import operations
from router.access.audit import CANCELLED, NOBODY, OK, Audit, Gathering, changes
from router.access.guard import OFF, OPEN, Guard
from router.access.operations import Noun, Operation
from router.rest.asked import decoded, split_path

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

_TABLE = web.AppKey("operations", dict[web.AbstractRoute, Operation])
_PRINCIPAL = web.RequestKey("principal", Principal)
_MODELS = web.RequestKey("models", tuple[str, ...])
_READ = (AUTHORIZATION, CLIENT_CERTIFICATE)


def prepare(app: web.Application) -> None:
    """Prepares an application for `add`."""
    app[_TABLE] = {}


def add(
    app: web.Application, method: str, path: str, operation: Operation, handler: Handler, *, head: bool = False
) -> None:
    """Adds a route, and notes its operation. With `head`, a GET route answers HEAD too."""
    for one in (method, "HEAD") if head and method == "GET" else (method,):
        app[_TABLE][app.router.add_route(one, path, handler)] = operation


def operation_of(request: web.Request) -> Operation:
    """Returns the operation that a request asks for, or `SERVER` for an unknown path."""
    return request.app[_TABLE].get(request.match_info.route, operations.SERVER)


def is_plain(request: web.Request) -> bool:
    """Returns whether the fixed segments of a request's path are written without percent-encoding.

    aiohttp also finds a route for a path such as `/%6Desh/v1/models`, but code that reads the raw path does not
    recognise it. Such paths are refused before the guard decides."""
    resource = request.match_info.route.resource
    if resource is None:
        return True
    pairs = zip(resource.canonical.split("/"), request.rel_url.raw_path.split("/"), strict=False)
    return all("{" in fixed or fixed == given for fixed, given in pairs)


async def ask(request: web.Request, guard: Guard) -> None:
    """Identifies the caller of a request, and checks the caller's permission. If the operation needs neither, the
    caller is `OPEN`. Raises MeshError."""
    operation = operation_of(request)
    if not guard.asks(operation.verb) and not (guard.asks(Verb.READ) and _managing(request, operation)):
        request[_PRINCIPAL] = OPEN
        return
    principal = request[_PRINCIPAL] = await guard.identified(_headers(request))
    if operation.noun is not Noun.MODELS:  # each line names one, and is decided alone
        guard.allow(principal, operation.verb, _name(request, operation))


async def audited(
    request: web.Request, guard: Guard, audit: Audit, handler: Handler, check: Callable[[web.Request], None]
) -> web.StreamResponse:
    """Checks a request with `check` and `ask`, runs its handler, and writes the outcome of a change to the audit
    trail."""
    result = CANCELLED
    try:
        check(request)
        if guard.mode != OFF:
            await ask(request, guard)
        response = await handler(request)
        result = OK if response.status < HTTPStatus.BAD_REQUEST else str(response.status)
        return response
    except MeshError as error:
        result = error.reason.name
        raise
    except Exception as error:
        result = type(error).__name__
        raise
    finally:
        operation = operation_of(request)
        if changes(operation):
            audit.note(
                operation,
                who=_who(request, guard),
                name=_shown(request),
                peer=_peer(request),
                result=result,
                models=request.get(_MODELS, ()),
            )


def principal_of(request: web.Request) -> Principal:
    """Returns the caller of a request that `ask` has admitted."""
    principal: Principal = request.get(_PRINCIPAL, OPEN)
    return principal


def concerns(request: web.Request, models: Sequence[str]) -> None:
    """Adds models that a request concerns to its line in the audit trail."""
    request[_MODELS] = tuple(dict.fromkeys((*request.get(_MODELS, ()), *models)))


def gathering(request: web.Request, guard: Guard, audit: Audit) -> Gathering:
    """Returns the object that notes the models of a bulk request for the audit trail."""

    def note(models: Sequence[str], result: str) -> None:
        who = _who(request, guard)
        audit.note(
            operation_of(request), who=who, name=_shown(request), peer=_peer(request), result=result, models=models
        )

    return Gathering(note)


def may(request: web.Request, guard: Guard, verb: Verb, names: Iterable[str]) -> None:
    """Checks that the caller may perform operations of `verb` on each of the names. Otherwise raises MeshError."""
    principal = principal_of(request)
    for name in names:
        guard.allow(principal, verb, name)


def reader(request: web.Request, guard: Guard) -> Callable[[str], bool]:
    """Returns a function that takes a model's id and returns whether the caller may read the model."""
    principal = principal_of(request)
    return lambda model_id: guard.ruling(principal, Verb.READ, model_id).allowed


def _who(request: web.Request, guard: Guard) -> str:
    """Returns the caller's name for the audit trail."""
    if _PRINCIPAL in request or guard.mode == OFF:
        return principal_of(request).name
    return NOBODY  # the request was refused before its caller was identified


def _managing(request: web.Request, operation: Operation) -> bool:
    """Returns whether a request that is open to every known caller belongs to management."""
    return operation.verb is Verb.KNOWN and request.rel_url.raw_path.startswith("/mesh/")


def _shown(request: web.Request) -> str:
    """Returns the name in the path of a request, or `EVERYTHING` if the path has none."""
    segments = request.rel_url.raw_path.split("/")
    return unquote(segments[4]) if len(segments) > 4 else patterns.EVERYTHING


def _peer(request: web.Request) -> str:
    """Returns the address of a request's sender. Behind Envoy, this is the address that Envoy states, because the
    connection is one to a unix socket."""
    found: str = request.headers.get(PEER.decode(), "")
    return request.remote or found


def _name(request: web.Request, operation: Operation) -> str:
    raw_path = request.rel_url.raw_path
    if operation is operations.INFER:
        return split_path(raw_path).model
    if operation in (operations.LIST, operations.LIST_VMODELS):
        return patterns.listed(request.query.get("prefix", "") if not raw_path.startswith("/v2") else "")
    if operation.noun in (Noun.MODEL, Noun.VMODEL):
        return decoded(raw_path.split("/")[4])
    return patterns.EVERYTHING


def _headers(request: web.Request) -> list[Header]:
    return [
        (name, value.encode("utf-8", "surrogateescape"))
        for name in _READ
        for value in request.headers.getall(name.decode(), ())
    ]
