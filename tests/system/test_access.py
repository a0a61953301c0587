"""Access control of a mesh of real processes: both edges, requests of all kinds, revocation, and etcd away.

The promises, and the test of each:

- each request with each key and token is allowed or refused as `decide` says, behind Envoy and `grpc.aio`:
  `test_the_matrix`
- no call fails while an issuer rotates its keys: `test_no_call_fails_while_the_issuer_rotates_its_keys`
- no log has a token: `test_no_token_is_in_a_log`
- a revoked key is refused by every worker of each router: `test_a_revoked_key_is_refused_by_every_router`
- the documented commands work: `test_the_commands_of_the_docs`, `test_the_commands_about_tokens`
- while etcd is away, known keys work and unknown ones do not: `test_known_keys_work_while_etcd_is_away`
"""

import asyncio
import json
import re

import grpc
import jwt
import numpy as np
import pytest
import pytest_asyncio

from mesh.access.grants import Grants, decide, grant
from mesh.access.principals import Principal
from mesh.access.verbs import Role, Verb
from mesh.pb import inference_pb2, modelmesh_pb2, modelmesh_pb2_grpc
from tests.support import documented, models
from tests.support.documented import Shell
from tests.support.etcd import EtcdServer
from tests.support.kubeapi import KubeApi
from tests.support.localmesh import LocalMesh, infer_request
from tests.support.tokens import AUDIENCE, FakeIssuer, IssuerServer
from tests.support.waiting import until

pytestmark = pytest.mark.asyncio(loop_scope="module")

ADMIN = "a" * 40
ONE = np.ones((1, 1), np.float32)
INFER = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 1], "data": [1.0]}]}
V2 = "/inference.GRPCInferenceService/"
SUBJECTS = ("key:{}", "user:{}", "group:{}", "serviceaccount:team-a:{}")
GRANTS = {role.value: grant(role, ["*"], [one.format(role) for one in SUBJECTS]) for role in Role} | {
    "scoped": grant("infer", ["team/*"], [one.format("scoped") for one in SUBJECTS])
}
HOLDERS = [*map(str, Role), "scoped", "nobody"]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def issuer():
    async with IssuerServer(FakeIssuer()) as server:
        yield server.issuer


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def kubernetes(tmp_path_factory):
    async with KubeApi(tmp_path_factory.mktemp("kube")) as api:
        yield api


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def mesh(tmp_path_factory, issuer, kubernetes):
    """A mesh that accepts keys and tokens, with two routers. The second router has the other edge."""
    folder = tmp_path_factory.mktemp("access")
    (folder / "admin.key").write_text(ADMIN)
    options = ["--auth", "required", "--admin-key-file", str(folder / "admin.key"), "--workers", "2"]
    options += ["--auth-jwt-issuer", issuer.url, "--auth-jwt-audience", AUDIENCE]
    options += ["--auth-kubernetes", "review", "--auth-kubernetes-api", kubernetes.url]
    options += ["--auth-kubernetes-account", str(kubernetes.account)]
    with EtcdServer(folder / "etcd") as etcd:
        mesh = LocalMesh(
            folder,
            etcd,
            pods=1,
            routers=2,
            key=ADMIN,
            base="mm/mesh",
            router_options=options,
            options_of={"router-2": ["--edge", "grpc"]},
        )
        async with mesh:
            for name in ("team/x", "other"):
                path = mesh.write(f"{name.replace('/', '-')}.onnx", models.constant(7.0))
                body = {"type": "onnx", "path": path.as_uri(), "load": True, "sync": True}
                answer = await mesh.rest("PUT", f"/mesh/v1/models/{name.replace('/', '%2F')}", body)
                assert answer.status == 201, answer.body
            yield mesh


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def keys(mesh):
    """The keys of all holders, by holder. The grants in `GRANTS` apply to them."""
    made = {}
    for name in HOLDERS:
        answer = await mesh.rest("PUT", f"/mesh/v1/keys/{name}", {})
        assert answer.status == 201, answer.body
        made[name] = answer.json["key"]
    for name, one in GRANTS.items():
        body = {"role": one.role, "models": list(one.models), "to": list(one.to)}
        assert (await mesh.rest("PUT", f"/mesh/v1/grants/{name}", body)).status == 201
    for router in range(2):
        for holder in ("admin", "scoped"):
            path = "/v2/models/team%2Fx/infer"
            await until_each_worker(mesh, router, made[holder], path, 200)
    return made


async def rest(mesh, router, method, path, key, body=None):
    headers = {"Authorization": f"Bearer {key}" if key else ""}
    data = None if body is None else json.dumps(body).encode()
    answer = await asyncio.to_thread(mesh._request, method, mesh.rest_url(router) + path, data, headers, 60)
    return answer.status


async def until_each_worker(mesh, router, key, path, status):
    """Waits until 20 calls in a row, enough to reach both workers, get the status."""

    async def all_have():
        found = [await rest(mesh, router, "POST", path, key, INFER) for _ in range(20)]
        return found == [status] * 20

    await until(all_have, timeout=30, interval=0.05, why=f"router {router} answers {path} with {status}")


async def code(call, key):
    """Makes a gRPC call with a key, and returns the name of its status."""
    metadata = (("authorization", f"Bearer {key}"),) if key else ()
    try:
        answer = call(metadata)
        if hasattr(answer, "__aiter__"):
            async for _ in answer:
                pass
        else:
            await answer
    except grpc.aio.AioRpcError as error:
        return error.code().name
    return "OK"


def doors(mesh, router):
    """Returns the requests to a router that the matrix tries. Each has a name, the verb and the model for which it
    needs a grant, and a function that sends the request with a key and returns the status."""
    port = mesh.ports[mesh.routers[router].name][0]
    channel = grpc.aio.insecure_channel(f"127.0.0.1:{port}")
    mesh.channels.append(channel)
    stub = modelmesh_pb2_grpc.ModelMeshStub(channel)
    infer = infer_request("team/x", x=ONE)
    pb = inference_pb2

    def unary(method, request):
        return channel.unary_unary(method, lambda message: message.SerializeToString(), bytes), request

    def stream(method, request):
        return channel.stream_stream(method, lambda message: message.SerializeToString(), bytes), [request]

    calls = {
        "infer": (Verb.INFER, "team/x", unary(V2 + "ModelInfer", infer), ()),
        "infer other": (Verb.INFER, "other", unary(V2 + "ModelInfer", infer_request("other", x=ONE)), ()),
        "infer missing": (Verb.INFER, "no", unary(V2 + "ModelInfer", infer_request("no", x=ONE)), ()),
        "metadata": (Verb.INFER, "team/x", unary(V2 + "ModelMetadata", pb.ModelMetadataRequest(name="team/x")), ()),
        "ready": (Verb.INFER, "team/x", unary(V2 + "ModelReady", pb.ModelReadyRequest(name="team/x")), ()),
        "foreign": (Verb.INFER, "other", unary("/some.Thing/do", infer), (("mm-model-id", "other"),)),
        "stream": (Verb.INFER, "team/x", stream("/some.Thing/flow", infer), (("mm-model-id", "team/x"),)),
        "server": (Verb.KNOWN, "*", unary(V2 + "ServerMetadata", pb.ServerMetadataRequest()), ()),
        "live": (Verb.PUBLIC, "*", unary(V2 + "ServerLive", pb.ServerLiveRequest()), ()),
        "repository": (Verb.KNOWN, "*", unary(V2 + "RepositoryIndex", pb.ServerLiveRequest()), ()),
        "status": (Verb.READ, "team/x", (stub.getModelStatus, modelmesh_pb2.GetStatusRequest(modelId="team/x")), ()),
        "load": (Verb.REGISTER, "team/x", (stub.ensureLoaded, modelmesh_pb2.EnsureLoadedRequest(modelId="team/x")), ()),
    }

    def over_grpc(made, more):
        method, request = made

        async def ask(key):
            # A stream that is refused while grpcio still sends its message may end as a reset, without the status.
            for _ in range(10):
                status = await code(lambda metadata: method(request, metadata=(*metadata, *more), timeout=60), key)
                if status != "INTERNAL" or not isinstance(request, list):
                    break
            return status

        return ask

    def over_rest(method, path, body=None):
        async def ask(key):
            return await rest(mesh, router, method, path, key, body)

        return ask

    found = [(f"gRPC {name}", verb, model, over_grpc(made, more)) for name, (verb, model, made, more) in calls.items()]
    for verb, name, method, path, body in (
        (Verb.INFER, "team/x", "POST", "/v2/models/team%2Fx/infer", INFER),
        (Verb.INFER, "other", "POST", "/v2/models/other/infer", INFER),
        (Verb.INFER, "no", "POST", "/v2/models/no/infer", INFER),
        (Verb.INFER, "team/x", "GET", "/v2/models/team%2Fx", None),
        (Verb.READ, "*", "GET", "/v2/models", None),
        (Verb.KNOWN, "*", "GET", "/v2", None),
        (Verb.PUBLIC, "*", "GET", "/v2/health/live", None),
        (Verb.READ, "*", "GET", "/mesh/v1/models", None),
        (Verb.READ, "team/*", "GET", "/mesh/v1/models?prefix=team/", None),
        (Verb.READ, "team/x", "GET", "/mesh/v1/models/team%2Fx", None),
        (Verb.READ, "no", "GET", "/mesh/v1/models/no", None),
        (Verb.REGISTER, "team/x", "POST", "/mesh/v1/models/team%2Fx/load", {}),
        (Verb.ADMIN, "*", "PUT", "/mesh/v1/settings/type_limits", {}),
        (Verb.ADMIN, "*", "GET", "/mesh/v1/keys", None),
        (Verb.KNOWN, "*", "GET", "/mesh/v1/whoami", None),
    ):
        found.append((f"{method} {path}", verb, name, over_rest(method, path, body)))

    async def scrape(key):
        headers = {"Authorization": f"Bearer {key}" if key else ""}
        answer = await asyncio.to_thread(mesh._request, "GET", f"{mesh.probe_url(router)}/metrics", None, headers, 60)
        return answer.status

    found.append(("GET /metrics", Verb.READ, "*", scrape))
    return found


def identities(keys, issuer, kubernetes):
    """Returns all kinds of valid credentials of all holders, each with its principal, and invalid credentials, each
    with None."""
    found = [(keys[holder], Principal(f"key:{holder}")) for holder in HOLDERS]
    for holder in HOLDERS:
        account = f"serviceaccount:team-a:{holder}"
        found += [
            (issuer.token(holder), Principal(f"user:{holder}")),
            (issuer.token("someone", groups=["x", holder]), Principal("user:someone", [f"group:{holder}"])),
            (kubernetes.account_token(holder), Principal(account)),
        ]
    other = FakeIssuer(issuer.url)
    invalid = [
        "",
        "mesh_" + "w" * 43,
        issuer.token("admin", aud="other"),
        issuer.token("admin", lifetime=-600),
        issuer.token("admin", iss="https://other.example"),
        other.token("admin", headers={"kid": issuer.current}),
        jwt.encode(issuer.claims("admin"), "s" * 64, "HS256", headers={"kid": issuer.current}),
        issuer.token("system:serviceaccount:team-a:admin"),
        kubernetes.account_token("admin", aud=kubernetes.issuer.url),
        issuer.token("admin").rpartition(".")[0] + ".",
    ]
    return found + [(token, None) for token in invalid]


@pytest.mark.parametrize("router", [0, 1], ids=["envoy", "grpc"])
async def test_the_matrix(mesh, keys, issuer, kubernetes, router):
    """Each request with each key or token is allowed, forbidden or unauthenticated, as the grants demand."""
    grants = Grants(GRANTS)
    credentials = identities(keys, issuer, kubernetes)
    for door, verb, name, ask in doors(mesh, router):
        statuses = await asyncio.gather(*(ask(token) for token, _ in credentials))
        for (token, principal), status in zip(credentials, statuses, strict=True):
            told = (door, principal, token[:60], status)
            if verb is Verb.PUBLIC or (principal is not None and decide(grants, principal, verb, name).allowed):
                assert status not in (401, 403, "UNAUTHENTICATED", "PERMISSION_DENIED"), told
            elif principal is None:
                assert status in (401, "UNAUTHENTICATED"), told
            else:
                assert status in (403, "PERMISSION_DENIED"), told


@pytest.mark.parametrize("router", [0, 1], ids=["envoy", "grpc"])
async def test_no_call_fails_while_the_issuer_rotates_its_keys(mesh, keys, issuer, router):
    """The second half of the calls has tokens that are signed with a key that the issuer has just made."""
    path = "/v2/models/other/infer"
    for turn in range(2):
        for number in range(5):
            assert await rest(mesh, router, "POST", path, issuer.token("infer", jti=f"{turn}{number}"), INFER) == 200
        issuer.rotate()


async def test_no_token_is_in_a_log(mesh, keys, issuer, kubernetes):
    """No log of a process contains the claims or the signature of a token. (tests/router/calls/test_guarded.py proves
    that the model server gets no token, because its requests can be seen there.)"""
    marked = [issuer.token("infer", jti="findme"), issuer.token("infer", aud="findme"), kubernetes.account_token("x")]
    for token in marked:
        for router in range(2):
            await rest(mesh, router, "POST", "/v2/models/other/infer", token, INFER)
    logs = [path.read_text() for path in mesh.folder.rglob("*.log")]
    assert len(logs) >= 3
    for token in marked:
        for part in token.split(".")[1:]:
            assert not any(part in text for text in logs)


async def test_the_commands_about_tokens(mesh, keys, kubernetes, tmp_path):
    """The commands of docs/security.md about tokens work behind routers that are already running. In place of the
    command that creates a token, the test writes a token of the fake API server."""
    shell = Shell(tmp_path / "here", MESH_ENDPOINT=mesh.rest_url(), MESH_API_KEY=ADMIN)
    _, *grants = (command.text for command in documented.block("security.md", "Tokens of an identity provider"))
    _, _, add, create, whoami = (
        command.text for command in documented.block("security.md", "Kubernetes service accounts")
    )
    for command in (*grants, add):
        await asyncio.to_thread(typed, shell, command)
    assert create.endswith("> token")
    (shell.folder / "token").write_text(kubernetes.account_token("batch"))
    told = await asyncio.to_thread(typed, shell, whoami)
    assert "serviceaccount:team-a:batch" in told
    assert "batch" in told
    for name in ("fraud-team", "dashboard", "batch"):
        assert (await mesh.rest("DELETE", f"/mesh/v1/grants/{name}")).json["existed"]


async def test_a_revoked_key_is_refused_by_every_router(mesh, keys):
    made = (await mesh.rest("PUT", "/mesh/v1/keys/soon", {"role": "infer", "models": ["*"]})).json["key"]
    path = "/v2/models/other/infer"
    for router in range(2):
        await until_each_worker(mesh, router, made, path, 200)
    assert (await mesh.rest("DELETE", "/mesh/v1/keys/soon")).json["existed"]
    for router in range(2):
        await until_each_worker(mesh, router, made, path, 401)


async def test_a_rotated_key_works_without_a_gap(mesh, keys):
    first = (await mesh.rest("PUT", "/mesh/v1/keys/turns", {"role": "infer", "models": ["*"]})).json["key"]
    path = "/v2/models/other/infer"
    for router in range(2):
        await until_each_worker(mesh, router, first, path, 200)
    second = (await mesh.rest("POST", "/mesh/v1/keys/turns/rotate", {"overlap": 3600})).json["key"]
    for router in range(2):
        await until_each_worker(mesh, router, second, path, 200)
        assert await rest(mesh, router, "POST", path, first, INFER) == 200


def typed(shell: Shell, command: str) -> str:
    done = shell.run(command)
    assert done.returncode == 0, f"$ {command}\n{done.stdout}{done.stderr}"
    return done.stdout


@pytest.mark.timeout(600)  # fifteen commands, each of which starts Python
async def test_the_commands_of_the_docs(mesh, keys, tmp_path):
    """The commands of docs/security.md about keys and grants work, and the keys that they print identify their holders.
    In place of `mesh up`, the test uses a mesh that is already running."""
    shell = Shell(tmp_path / "here", MESH_ENDPOINT=mesh.rest_url())
    (shell.folder / ".mesh").mkdir()
    (shell.folder / ".mesh" / "admin.key").write_text(ADMIN + "\n")
    toml = re.search(r"```toml\n(.*?)```", (documented.DOCS / "security.md").read_text(), re.DOTALL)
    assert toml is not None
    (shell.folder / "grants.toml").write_text(toml[1])
    before = (await mesh.rest("GET", "/mesh/v1/grants")).json["grants"]

    up, *rest_of = (command.text for command in documented.block("security.md", "Switch it on"))
    assert up == "mesh up --auth required"
    assert "the admin key" in "".join([await asyncio.to_thread(typed, shell, command) for command in rest_of])

    create, ls, rotate, revoke = (command.text for command in documented.block("security.md", "Keys"))
    key = (await asyncio.to_thread(typed, shell, create)).strip()
    assert "ci" in await asyncio.to_thread(typed, shell, ls)
    await until(lambda: _is(mesh, key, "key:ci"), timeout=30, why="the new key is known")
    again = (await asyncio.to_thread(typed, shell, rotate)).strip()
    await until(lambda: _is(mesh, again, "key:ci"), timeout=30, why="the rotated key is known")
    await asyncio.to_thread(typed, shell, revoke)

    for command in (command.text for command in documented.block("security.md", "Grants")):
        await asyncio.to_thread(typed, shell, command)
    found = (await mesh.rest("GET", "/mesh/v1/grants")).json["grants"]
    kept = set(before) & set(keys)  # the grants of the fixture bear the names of keys
    assert set(found) - {"turns"} == {"fraud-team"} | kept

    (first,) = (command.text for command in documented.block("security.md", "The first key without a router"))
    first = first.replace("http://127.0.0.1:2379", mesh.etcd.endpoint)
    root = (await asyncio.to_thread(typed, shell, first)).strip()
    await until(lambda: _is(mesh, root, "key:root"), timeout=30, why="the first key is known")


async def _is(mesh, key, name):
    headers = {"Authorization": f"Bearer {key}"}
    answer = await mesh.rest("GET", "/mesh/v1/whoami", headers=headers)
    return answer.status == 200 and answer.json["name"] == name


async def test_known_keys_work_while_etcd_is_away(mesh, keys):
    """Without etcd, known keys keep their rights, and unknown keys are refused. (This test is the last, because it
    kills etcd.)"""
    mesh.etcd.kill9()
    for router in range(2):
        for key, status in ((keys["infer"], 200), (keys["read"], 403), ("mesh_" + "w" * 43, 401)):
            assert await rest(mesh, router, "POST", "/v2/models/other/infer", key, INFER) == status
    headers = {"Authorization": f"Bearer {keys['read']}"}

    async def stale():
        answer = await asyncio.to_thread(mesh._request, "GET", f"{mesh.probe_url()}/metrics", None, headers, 60)
        (line,) = re.findall(r"^mesh_registry_stale_seconds(?:\{.*\})? (\S+)$", answer.body.decode(), re.MULTILINE)
        return float(line) > 0

    await until(stale, timeout=60, why="the metric says how old the keys are")
    mesh.etcd.start_now()
    await until(lambda: _away_is_over(mesh), timeout=60, why="etcd is back")


async def _away_is_over(mesh):
    return (await mesh.rest("GET", "/mesh/v1/keys")).status == 200
