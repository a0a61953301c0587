"""REST in a mesh that identifies its callers: every route, every role, and tricks with paths and headers."""

import asyncio
import json

import aiohttp
import pytest
from cryptography.x509 import DNSName
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from yarl import URL

from mesh.access.grants import decide
from mesh.access.verbs import Role, Verb
from mesh.schema.authstore import AuthStore
from mesh.statuses import Reason
from placement.vmodels.record import VModelRecord
from router.access import operations
from router.access.audit import Audit
from router.access.clientcerts import ClientCertificates
from router.access.operations import Noun
from router.calls import answers
from router.rest import access as accessapi
from router.rest import management
from tests.router.rest import conftest
from tests.support import certificates
from tests.support.access import SlowTokens, guard_of
from tests.support.examples import examples
from tests.support.tokens import FakeIssuer, known_tokens
from tests.support.waiting import until

INFER = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1], "data": [1.0]}]}
ROLES = {role.value: "mesh_" + role.value.ljust(43, "x") for role in Role}
KEYS = {**ROLES, "scoped": "mesh_" + "s" * 43, "nobody": "mesh_" + "n" * 43}
GRANTS = {role: (role, ["*"], [f"key:{role}"]) for role in ROLES} | {
    "scoped": ("register", ["team/*"], ["key:scoped"]),
}
ISSUER = FakeIssuer()
WITHOUT_GRANTS = {
    "key": KEYS["nobody"],
    "token": ISSUER.token("nobody", groups=["nobody"]),
    "forged": FakeIssuer().token("admin", headers={"kid": ISSUER.current}),
}
REFUSED = {401: "UNAUTHENTICATED", 403: "FORBIDDEN"}


@pytest.fixture
def mode():
    """Returns the mode of the guard. A test overrides it by a parameter."""
    return "required"


@pytest.fixture
async def worker(worker, mode, etcd, keys):
    worker.guard = guard_of(mode, KEYS, GRANTS, others=[known_tokens(ISSUER)])
    worker.authstore = AuthStore(etcd, keys)
    dispatch = worker.dispatcher.dispatch

    def guarded(call):  # as the dispatcher of a worker does
        if worker.guard.asks(Verb.INFER):
            name = worker_name(call.frame)
            try:
                worker.guard.allow(worker.guard.known(call.headers), Verb.INFER, name)
            except management.MeshError as error:
                answers.fail(call, error)
                return
        dispatch(call)

    worker.models._dispatch = guarded
    return worker


def worker_name(frame):
    return frame[7 : 7 + frame[6]].decode()


def auth_of(key):
    return {} if key is None else {"Authorization": f"Bearer {key}"}


async def ask(http, method, path, *, key=None, body=None, headers=None):
    """Sends a request, and returns the status and the JSON of the answer."""
    url = URL(str(http._base_url).rstrip("/") + path, encoded=True)
    sent = {"Content-Type": "application/json"} | auth_of(key) | (headers or {})
    data = None if body is None else json.dumps(body)
    async with http.request(method, url, data=data, headers=sent) as answer:
        text = await answer.text()
        if answer.status == 401:
            assert answer.headers["WWW-Authenticate"] == 'Bearer realm="mesh"'
        try:
            return answer.status, json.loads(text)
        except ValueError:
            return answer.status, {}


def named(route):
    """Returns the name for which Mesh authorises a request of the route with the name `team/x` or the prefix
    `team/`."""
    if route.operation in (operations.LIST, operations.LIST_VMODELS):
        return "team/*"
    return "team/x" if route.operation.noun in (Noun.MODEL, Noun.VMODEL) else "*"


ROUTES = management.ROUTES + accessapi.ROUTES


@pytest.mark.parametrize("mode", ["management", "required"])
async def test_every_route_of_management_is_decided_for_every_key(http, worker, mode):
    """A request of each route gets 401 without a valid key, 403 if `decide` denies it, and otherwise another status."""
    guard = worker.guard
    for route in ROUTES:
        name = "team%2Fx" if route.operation.noun in (Noun.MODEL, Noun.VMODEL) else "x1"
        path = route.path.replace("{id:[^/]+}", name) + ("?prefix=team/" if named(route) == "team/*" else "")
        for holder, key in {**KEYS, "": None, "wrong": "mesh_" + "w" * 43}.items():
            status, answer = await ask(http, route.method, path, key=key)
            if holder in ("", "wrong"):
                assert (status, answer["reason"]) == (401, "UNAUTHENTICATED"), (route, holder)
                continue
            principal = guard.known([(b"authorization", b"Bearer " + key.encode())])
            # Each line of a bulk request is decided alone, but some grant of the role is needed in any case.
            subject = "team/x" if route.operation.noun is Noun.MODELS else named(route)
            expected = decide(guard.authority.grants, principal, route.operation.verb, subject).allowed
            assert (status not in REFUSED) is expected, (route, holder, status, answer)
            assert expected or answer["reason"] == "FORBIDDEN"


@pytest.mark.parametrize("mode", ["off"])
async def test_an_open_mesh_asks_nobody(http, mode):
    for path in ("/mesh/v1/models", "/mesh/v1/keys", "/mesh/v1/whoami", "/v2", "/v2/models"):
        status, answer = await ask(http, "GET", path)
        assert status not in REFUSED, (path, answer)


@pytest.mark.parametrize("mode", ["management"])
async def test_management_asks_and_inference_does_not(http, mode):
    assert (await ask(http, "POST", "/v2/models/m/infer", body=INFER))[0] == 200
    assert (await ask(http, "GET", "/v2"))[0] == 200
    assert (await ask(http, "GET", "/v2/models"))[0] == 401
    assert (await ask(http, "GET", "/mesh/v1/nothing"))[0] == 401
    assert (await ask(http, "GET", "/nothing"))[0] == 404


async def test_each_path_of_v2_is_asked(http):
    """Health checks are answered for everybody, because probes have no key. Other paths, even unknown ones, need a
    known caller."""
    for path in ("/v2/health/live", "/v2/health/ready"):
        assert (await ask(http, "GET", path))[0] == 200
    for method, path in (
        ("GET", "/v2"),
        ("GET", "/v2/models"),
        ("GET", "/v2/models/m"),
        ("GET", "/v2/models/m/ready"),
        ("POST", "/v2/models/m/infer"),
        ("POST", "/v2/repository/index"),
        ("GET", "/nothing"),
        ("DELETE", "/v2"),
    ):
        status, answer = await ask(http, method, path)
        assert (status, answer.get("reason")) == (401, "UNAUTHENTICATED"), path
    assert (await ask(http, "GET", "/v2", key=KEYS["nobody"]))[0] == 200
    assert (await ask(http, "GET", "/nothing", key=KEYS["nobody"]))[0] == 404
    assert (await ask(http, "POST", "/v2/repository/index", key=KEYS["nobody"]))[0] == 501
    assert (await ask(http, "GET", "/v2/models", key=KEYS["scoped"]))[0] == 403
    assert (await ask(http, "GET", "/v2/models", key=KEYS["read"]))[0] == 200


@pytest.mark.parametrize("holder", [*KEYS, ""])
async def test_inference_is_for_those_who_may_infer(http, worker, holder):
    key = KEYS.get(holder)
    expected = {"infer": 200, "admin": 200, "": 401}.get(holder, 403)
    for method, path, body in (
        ("POST", "/v2/models/team%2Fx/infer", INFER),
        ("GET", "/v2/models/team%2Fx", None),
        ("GET", "/v2/models/team%2Fx/ready", None),
    ):
        assert (await ask(http, method, path, key=key, body=body))[0] == expected
    if expected != 200:
        assert not worker.dispatcher.calls


class TestThePlainServer:
    """The plain HTTP server, which serves inference without aiohttp, alone and behind Envoy."""

    @pytest.fixture(params=["plain", "envoy"])
    def carrier(self, request):
        return request.param

    @pytest.mark.parametrize("holder", [*KEYS, ""])
    async def test_inference_is_for_those_who_may_infer(self, http, worker, holder):
        expected = {"infer": 200, "admin": 200, "": 401}.get(holder, 403)
        for _ in range(4):  # a head is known from its third time on
            status, answer = await ask(http, "POST", "/v2/models/m/infer", key=KEYS.get(holder), body=INFER)
            assert status == expected
            assert expected == 200 or answer["reason"] == REFUSED[expected]
        assert bool(worker.dispatcher.calls) is (expected == 200)

    async def test_a_revoked_key_is_refused_even_if_the_head_is_known(self, http, worker):
        for _ in range(4):
            assert (await ask(http, "POST", "/v2/models/m/infer", key=KEYS["infer"], body=INFER))[0] == 200
        worker.guard.authority.snapshot(2, [])
        assert (await ask(http, "POST", "/v2/models/m/infer", key=KEYS["infer"], body=INFER))[0] == 401

    async def test_a_refused_request_is_refused_before_its_body_is_read_as_json(self, http):
        status, answer = await ask(http, "POST", "/v2/models/m/infer", body="not an object")
        assert (status, answer["reason"]) == (401, "UNAUTHENTICATED")

    async def test_a_request_waits_until_its_caller_is_identified(self, http, worker):
        await waits_for_its_caller(http, worker)

    async def test_a_fault_while_a_caller_is_identified_is_an_answer(self, http, worker):
        await answers_a_fault(http, worker)


async def test_a_request_waits_until_its_caller_is_identified(http, worker):
    await waits_for_its_caller(http, worker)


async def test_a_fault_while_a_caller_is_identified_is_an_answer(http, worker):
    await answers_a_fault(http, worker)


async def answers_a_fault(http, worker):
    """Checks that a request whose caller cannot be identified because of a fault of the router gets an answer."""
    slow = SlowTokens(broken=True)
    worker.guard.__dict__.update(guard_of("required", {}, {}, others=[slow]).__dict__)
    slow.known.set()
    status, answer = await ask(http, "POST", "/v2/models/m/infer", key="slow-anna", body=INFER)
    assert (status, answer["reason"]) == (500, "INTERNAL")


async def waits_for_its_caller(http, worker):
    """Checks that requests wait until their callers are identified, and are decided then."""
    slow = SlowTokens()
    grants = {"a": ("infer", ["m"], ["user:anna"])}
    guard = guard_of("required", {}, grants, others=[slow])
    worker.guard.__dict__.update(guard.__dict__)  # in place, because the servers hold this guard
    asked = {
        key: asyncio.create_task(ask(http, "POST", "/v2/models/m/infer", key=key, body=INFER))
        for key in ("slow-anna", "slow-bob", "slow-bad")
    }
    await until(lambda: slow.waiting == 3, why="all requests wait")
    assert not worker.dispatcher.calls
    slow.known.set()
    found = {key: (await task)[0] for key, task in asked.items()}
    assert found == {"slow-anna": 200, "slow-bob": 403, "slow-bad": 401}
    assert len(worker.dispatcher.calls) == 1


async def test_each_line_of_an_import_is_decided_alone(http, worker):
    lines = "".join(
        json.dumps({"id": one, "type": "onnx", "path": "/a"}) + "\n" for one in ("team/a", "other", "team/b")
    )
    headers = {"Content-Type": "application/x-ndjson"} | auth_of(KEYS["scoped"])
    async with http.post("/mesh/v1/models:import", data=lines, headers=headers) as answer:
        told = [json.loads(line) for line in (await answer.text()).splitlines()]
    assert told[0]["error"]["id"] == "other"
    assert told[0]["error"]["reason"] == "FORBIDDEN"
    assert (told[-1]["created"], told[-1]["failed"]) == (2, 1)
    assert set(worker.management.models) == {"team/a", "team/b"}
    async with http.post("/mesh/v1/models:unregister", data='{"id": "other"}\n', headers=headers) as answer:
        assert "FORBIDDEN" in await answer.text()


@pytest.mark.parametrize(
    "body",
    [
        {"target": "other"},
        {"weights": {"team/a": 1, "other": 1}},
        {"target": "team/a", "mirror": {"target": "other"}},
        {"version": "1", "target": "other", "model": {"type": "onnx", "path": "/a"}},
    ],
)
async def test_an_alias_may_only_name_models_that_its_owner_may_register(http, worker, body):
    """A request that names a model outside the caller's grant is refused, because the alias would give the caller
    access to that model."""
    status, answer = await ask(http, "PUT", "/mesh/v1/aliases/team%2Flive", key=KEYS["scoped"], body=body)
    assert (status, answer["reason"]) == (403, "FORBIDDEN")
    assert "on other" in answer["error"]
    assert not worker.management.vmodels.requests


async def test_an_alias_may_get_versions_of_its_own(http, worker):
    body = {"version": "7", "model": {"type": "onnx", "path": "/a"}}
    status, _ = await ask(http, "PUT", "/mesh/v1/aliases/team%2Flive", key=KEYS["scoped"], body=body)
    assert status not in REFUSED
    assert [one.item.model_id for one in worker.management.vmodels.requests] == ["team/live@7"]


def alias_to(worker, model):
    """Creates the alias `team/live`. The given model is its active model and, for a rollback, its previous version."""
    worker.management.vmodels.records["team/live"] = VModelRecord(owner="", active=model, target=model)


async def test_a_rollback_needs_a_right_to_the_version_that_it_chooses(http, worker):
    """A caller cannot move an alias back to a model outside the caller's grant, although the request does not name the
    model."""
    alias_to(worker, "other")
    path = "/mesh/v1/aliases/team%2Flive/rollback"
    status, answer = await ask(http, "POST", path, key=KEYS["scoped"], body={})
    assert (status, answer["reason"]) == (403, "FORBIDDEN")
    assert "on other" in answer["error"]
    assert not worker.management.vmodels.requests
    alias_to(worker, "team/live@1")
    assert (await ask(http, "POST", path, key=KEYS["scoped"], body={}))[0] == 200


async def test_the_status_of_an_alias_hides_models_that_the_caller_may_not_read(http, worker):
    """A caller who may read an alias sees the ids and states of its models, but errors and numbers of copies only of
    models that the caller may read."""
    path = "/mesh/v1/aliases/team%2Flive"
    alias_to(worker, "other")
    assert (await ask(http, "GET", path, key=KEYS["scoped"]))[1]["models"] == [{"id": "other", "status": "LOADED"}]
    whole = [{"id": "other", "status": "LOADED", "errors": [], "copies": 0}]
    assert (await ask(http, "GET", path, key=KEYS["read"]))[1]["models"] == whole


async def test_an_explanation_names_only_models_that_the_caller_may_read(http):
    path = "/mesh/v1/models/team%2Fx/explain"
    assert (await ask(http, "GET", path, key=KEYS["scoped"]))[1]["lines"] == ["it is so", "team/y is evicted for it"]
    assert len((await ask(http, "GET", path, key=KEYS["read"]))[1]["lines"]) == 3


@pytest.mark.parametrize("holder", ["nobody", "read", "infer"])
async def test_a_caller_who_may_register_nothing_begins_no_import(http, worker, holder):
    """A caller who may register nothing is refused before the body is read, and so cannot hold one of the few places
    for slow bodies."""
    endless = asyncio.Event()

    async def body():
        yield b'{"id": "m", "type": "onnx", "path": "/a"}\n'
        await endless.wait()

    headers = {"Content-Type": "application/x-ndjson"} | auth_of(KEYS[holder])
    async with asyncio.timeout(10), http.post("/mesh/v1/models:import", data=body(), headers=headers) as answer:
        assert answer.status == 403
        assert "no grant of register" in (await answer.json())["error"]
        endless.set()
    assert not worker.management.batches


async def test_keys_and_grants_over_rest(http, worker):
    """An admin creates a key with a role, lists it without its secret, rotates and revokes it. The admin also creates,
    replaces and deletes grants."""
    admin = KEYS["admin"]
    body = {"role": "infer", "models": ["fraud/*"], "groups": ["team-a"], "expires_in": 3600}
    status, made = await ask(http, "PUT", "/mesh/v1/keys/ci", key=admin, body=body)
    assert status == 201
    assert made["key"].startswith("mesh_")
    assert (await ask(http, "PUT", "/mesh/v1/keys/ci", key=admin, body=body))[0] == 409
    status, listed = await ask(http, "GET", "/mesh/v1/keys", key=admin)
    assert made["key"] not in json.dumps(listed)
    (one,) = listed["keys"]
    assert (one["name"], one["groups"], len(one["secrets"])) == ("ci", ["team-a"], 1)
    status, again = await ask(http, "POST", "/mesh/v1/keys/ci/rotate", key=admin, body={"overlap": 60})
    assert (status, again["key"] != made["key"], bool(again["former_until"])) == (200, True, True)
    given = (await ask(http, "GET", "/mesh/v1/grants", key=admin))[1]["grants"]
    assert given == {"ci": {"role": "infer", "models": ["fraud/*"], "to": ["key:ci"]}}
    grant = {"role": "read", "models": ["*"], "to": ["group:team-a"]}
    assert (await ask(http, "PUT", "/mesh/v1/grants/team-a", key=admin, body=grant))[0] == 201
    assert (await ask(http, "PUT", "/mesh/v1/grants/team-a", key=admin, body=grant))[0] == 200
    status, answer = await ask(http, "PUT", "/mesh/v1/grants", key=admin, body={"grants": {"team-b": grant}})
    assert answer == {"written": ["team-b"], "removed": ["team-a"]}
    assert (await ask(http, "DELETE", "/mesh/v1/grants/team-b", key=admin))[1]["existed"]
    assert (await ask(http, "DELETE", "/mesh/v1/keys/ci", key=admin))[1]["existed"]
    assert (await ask(http, "GET", "/mesh/v1/grants", key=admin))[1] == {"grants": {}}


@pytest.mark.parametrize(
    ("method", "path", "body", "why"),
    [
        ("PUT", "keys/ci", {"role": "root", "models": ["*"]}, "is not a role"),
        ("PUT", "keys/ci", {"role": "admin"}, "models is missing"),
        ("PUT", "keys/ci", {"models": ["*"]}, "role is missing"),
        ("PUT", "keys/ci", {"expires_in": -1}, "expires_in must be"),
        ("PUT", "keys/ci", {"groups": "a"}, "groups must be"),
        ("PUT", "keys/ci", {"secret": "mine"}, "secret"),
        ("PUT", "keys/a%2Fb", {}, "not a valid name"),
        ("POST", "keys/ci/rotate", {"overlap": "1h"}, "overlap must be"),
        ("PUT", "grants/g", {"role": "infer", "models": ["*"], "to": ["ci"]}, "is not a subject"),
        ("PUT", "grants/g", {"role": "infer", "models": ["*"]}, "to must be"),
        ("PUT", "grants", {"grants": []}, "must be an object"),
        ("PUT", "grants", {"grants": {"g": 7}}, "the grant g must be"),
        ("PUT", "grants", {"grants": {"a/b": {"role": "infer", "models": ["*"], "to": ["key:a"]}}}, "valid name"),
    ],
)
async def test_bad_requests_about_keys_and_grants(http, method, path, body, why):
    status, answer = await ask(http, method, f"/mesh/v1/{path}", key=KEYS["admin"], body=body)
    assert (status, answer["reason"]) == (400, "BAD_REQUEST"), answer
    assert why in answer["error"]


async def test_the_statistics_say_how_callers_are_identified(http):
    """`mesh doctor` reads from the statistics how callers are identified. The statistics contain no keys."""
    _, answer = await ask(http, "GET", "/mesh/v1/stats", key=KEYS["read"])
    assert answer["auth"]["mode"] == "required"
    assert [one["kind"] for one in answer["auth"]["callers"]] == ["admin", "tokens", "keys"]
    assert not any(key in json.dumps(answer) for key in KEYS.values())


async def test_a_caller_learns_what_it_may_do(http):
    _, answer = await ask(http, "GET", "/mesh/v1/whoami", key=KEYS["scoped"])
    assert answer["name"] == "key:scoped"
    assert answer["grants"] == {"scoped": {"role": "register", "models": ["team/*"], "to": ["key:scoped"]}}
    _, answer = await ask(http, "GET", "/mesh/v1/whoami", key=KEYS["nobody"])
    assert answer["grants"] == {}


# -- client certificates


@pytest.mark.parametrize("carrier", ["aiohttp", "plain", "envoy"])
async def test_a_client_cannot_set_the_header_of_a_certificate(worker, carrier, request):
    """Envoy removes the header in which it describes a client's certificate, so a client cannot forge it. The servers
    behind Envoy trust the header."""
    others = [ClientCertificates()]
    worker.guard = guard_of("required", KEYS, {"s": ("admin", ["*"], ["cert:scorer"])}, others=others)
    forged = certificates.forwarded(certificates.Authority().issue(DNSName("scorer"))).decode()
    believed = 401 if carrier == "envoy" else 200
    async with conftest.CARRIERS[carrier](worker, request) as port:
        async with aiohttp.ClientSession(f"http://127.0.0.1:{port}") as http:
            for name, expected in (
                ("X-Forwarded-Client-Cert", believed),
                ("x-forwarded-client-cert", believed),
                ("x_forwarded_client_cert", 401),
            ):
                status, _ = await ask(http, "POST", "/v2/models/m/infer", body=INFER, headers={name: forged})
                assert status == expected, name
                if carrier != "plain":
                    status, _ = await ask(http, "GET", "/mesh/v1/keys", headers={name: forged})
                    assert status == expected, name


# -- the audit trail


@pytest.fixture
def trail(worker, tmp_path):
    """Returns a function that lists the lines of the audit trail: who, what, name, result."""
    file = tmp_path / "audit.log"
    worker.audit = Audit(str(file))

    def read():
        assert "mesh_" not in file.read_text()
        found = [json.loads(line) for line in file.read_text().splitlines()]
        assert all(line["from"] == "127.0.0.1" for line in found)
        return [(line["who"], line["what"], line["name"], line["result"]) for line in found]

    yield read
    worker.audit.close()


@pytest.fixture
async def watched(trail, worker, carrier, request):
    """Serves the worker after it has got its audit trail, and yields an HTTP session."""
    async with conftest.CARRIERS[carrier](worker, request) as port:
        async with aiohttp.ClientSession(f"http://127.0.0.1:{port}") as session:
            yield session


@pytest.mark.parametrize("carrier", ["aiohttp", "envoy"])
async def test_each_change_has_a_line_with_its_caller_and_outcome(watched, trail, carrier):
    """Each change has a line, even if it was refused, and reads have none. The client's address is the one that the
    edge reports, not the one that the client claims."""
    forged = {"mesh-peer": "10.9.9.9"} if carrier == "envoy" else {}
    model = {"type": "onnx", "path": "/a"}
    for key, method, path, body in (
        (KEYS["scoped"], "PUT", "/mesh/v1/models/team%2Fx", model),
        (KEYS["scoped"], "PUT", "/mesh/v1/models/other", model),
        (None, "DELETE", "/mesh/v1/models/team%2Fx", None),
        (KEYS["read"], "GET", "/mesh/v1/models/team%2Fx", None),
        (KEYS["admin"], "GET", "/mesh/v1/keys", None),
        (KEYS["admin"], "PUT", "/mesh/v1/models/team%2Fx", {**model, "path": "/b"}),
        (KEYS["admin"], "PUT", "/mesh/v1/settings/type_limits", {}),
        (KEYS["admin"], "PUT", "/mesh/v1/keys/ci", {"role": "infer", "models": ["*"]}),
    ):
        await ask(watched, method, path, key=key, body=body, headers=forged)
    assert trail() == [
        ("key:scoped", "register", "team/x", "OK"),
        ("key:scoped", "register", "other", "FORBIDDEN"),
        ("-", "unregister", "team/x", "UNAUTHENTICATED"),
        ("key:admin", "register", "team/x", "CONFLICT"),
        ("key:admin", "set", "type_limits", "OK"),
        ("key:admin", "create-key", "ci", "OK"),
    ]


@pytest.fixture
def told(trail, tmp_path):
    """Returns a function that lists the lines of the audit trail with their models."""

    def read():
        found = map(json.loads, (tmp_path / "audit.log").read_text().splitlines())
        return [(line["who"], line["what"], line["name"], line.get("models", []), line["result"]) for line in found]

    return read


@pytest.mark.parametrize("carrier", ["aiohttp"])
async def test_the_models_of_a_bulk_request_are_noted(watched, told):
    """The trail lists the models that were registered or removed, and those that were refused."""
    ids = ["team/a", "other", "team/b"]
    headers = {"Content-Type": "application/x-ndjson"} | auth_of(KEYS["scoped"])
    for path, more in (("import", {"type": "onnx", "path": "/a"}), ("unregister", {})):
        lines = "".join(json.dumps({"id": one, **more}) + "\n" for one in ids)
        async with watched.post(f"/mesh/v1/models:{path}", data=lines, headers=headers) as answer:
            await answer.read()
    assert sorted(told()) == sorted(
        [
            ("key:scoped", "import", "*", ["other"], "FORBIDDEN"),
            ("key:scoped", "import", "*", ["team/a", "team/b"], "OK"),
            ("key:scoped", "import", "*", [], "OK"),
            ("key:scoped", "unregister-many", "*", ["other"], "FORBIDDEN"),
            ("key:scoped", "unregister-many", "*", ["team/a", "team/b"], "OK"),
            ("key:scoped", "unregister-many", "*", [], "OK"),
        ]
    )


@pytest.mark.parametrize("carrier", ["aiohttp"])
async def test_the_targets_of_an_alias_are_noted(watched, told, worker):
    """The trail lists the models that a request to move an alias names or, for a rollback, chooses."""
    alias_to(worker, "team/live@1")
    path = "/mesh/v1/aliases/team%2Flive"
    body = {"weights": {"team/a": 1, "team/b": 1}}
    await ask(watched, "PUT", path, key=KEYS["scoped"], body=body)
    await ask(watched, "POST", f"{path}/rollback", key=KEYS["scoped"], body={})
    assert told() == [
        ("key:scoped", "set-vmodel", "team/live", ["team/a", "team/b"], "OK"),
        ("key:scoped", "set-vmodel", "team/live", ["team/live@1"], "OK"),
    ]


@pytest.mark.parametrize("carrier", ["aiohttp"])
async def test_what_is_refused_before_the_caller_is_known_has_a_line_without_name(watched, told, worker):
    """Requests that a web page may have sent, and requests that arrive before keys could be read, have a line without
    the caller's name."""
    path = "/mesh/v1/models/team%2Fx"
    foreign = {"Origin": "https://example.com"}
    await ask(watched, "DELETE", path, key=KEYS["scoped"], headers=foreign)
    await ask(watched, "PUT", path, key=KEYS["scoped"], headers={"Content-Type": "text/plain"})
    worker.guard.authority.read = False
    worker.guard.clear()
    await ask(watched, "DELETE", path, key=KEYS["scoped"])
    assert told() == [
        ("-", "unregister", "team/x", [], "FORBIDDEN"),
        ("-", "register", "team/x", [], "UNSUPPORTED_TYPE"),
        ("-", "unregister", "team/x", [], "REGISTRY_AWAY"),
    ]


# -- tricks with paths

PIECES = st.sampled_from(
    [
        "team",
        "%2F",
        "%2f",
        "/",
        "..",
        "%2e%2e",
        ".",
        "x",
        "other",
        "%",
        "%00",
        "//",
        "*",
        "team%252Fx",
        "?a=/",
        "#",
        ";",
    ]
)
METHODS = st.sampled_from(["GET", "PUT", "PATCH", "DELETE", "HEAD", "POST", "OPTIONS", "get", "X"])
BEGINNINGS = st.sampled_from(["/mesh/v1/models/", "/mesh/v1/aliases/", "/v2/models/", "//mesh/v1/models/", "/mesh/"])
ENDS = st.sampled_from(["", "/load", "/infer", "/ready", "/explain", "/versions/1/infer"])


@given(METHODS, BEGINNINGS, st.lists(PIECES, max_size=4).map("".join), ENDS, st.sampled_from(sorted(WITHOUT_GRANTS)))
@settings(max_examples=examples(40), suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
async def test_no_trick_with_paths_turns_a_denial_into_an_answer(http, worker, method, beginning, middle, end, holder):
    """A caller without any grant gets an error and changes nothing, whatever the path looks like."""
    before = dict(worker.management.models)
    path = beginning + middle + end
    status, answer = await ask(http, method, path, key=WITHOUT_GRANTS[holder], body={"type": "onnx", "path": "/a"})
    assert status >= 400, (path, status, answer)
    assert answer.get("reason") in (
        None,
        Reason.FORBIDDEN.name,
        Reason.BAD_REQUEST.name,
        "UNKNOWN_METHOD",
        "UNSUPPORTED",
        *(["UNAUTHENTICATED"] if holder == "forged" else []),
    )
    assert worker.management.models == before
    assert not worker.dispatcher.calls
