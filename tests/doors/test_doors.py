"""Third-party clients and proxies: inference, metadata, management, large bodies, persistent connections, gzip.

Each is a real program with its defaults, and is tested with Envoy and with `--edge grpc`. Programs that are not
installed are skipped with the reason.
"""

import asyncio
import gzip
import json
import shutil
import subprocess
import sys
from pathlib import Path

import grpc
import numpy as np
import pytest

from mesh.pb import inference_pb2 as pb
from mesh.pb import inference_pb2_grpc, modelmesh_pb2, modelmesh_pb2_grpc
from tests.doors import clients, pythons
from tests.doors.nginx import Nginx

pytestmark = pytest.mark.asyncio(loop_scope="package")

REPOSITORY = Path(__file__).parents[2]


async def ran(*argv: str, timeout: float = 100) -> str:
    """Runs a program and returns its output. Raises AssertionError unless it exits with 0."""
    done = await asyncio.to_thread(
        subprocess.run, argv, capture_output=True, text=True, timeout=timeout, cwd=REPOSITORY
    )
    assert done.returncode == 0, f"{' '.join(argv)[:300]}:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done.stdout


def needs(program: str, package: str = "") -> pytest.MarkDecorator:
    """Returns a mark that skips a test if a program is not on PATH."""
    reason = f"{program} is not on PATH (Debian: {package or program})"
    return pytest.mark.skipif(shutil.which(program) is None, reason=reason)


def made(program: clients.Program) -> pytest.MarkDecorator:
    """Returns a mark that skips a test if a client has not been made."""
    return pytest.mark.skipif(bool(program.missing()), reason=program.missing())


@pytest.fixture
def body(tmp_path):
    """A folder of request bodies: a small one, the same one compressed, and a large one."""
    (tmp_path / "one").write_bytes(pythons.ONE)
    (tmp_path / "packed").write_bytes(gzip.compress(pythons.ONE))
    tensor = {"name": "x", "datatype": "FP32", "shape": [200_000], "data": list(range(200_000))}
    (tmp_path / "large").write_text(json.dumps({"inputs": [tensor]}))
    return tmp_path


# --- programs that may be installed


@pytest.mark.parametrize("name", pythons.CLIENTS)
async def test_pythons_clients(doors, name):
    assert await ran(sys.executable, "-m", "tests.doors.pythons", name, doors.rest) == "served\n"


CHUNKED = "Transfer-Encoding: chunked"
CURL = {
    "its defaults": [],
    "HTTP/1.0": ["--http1.0"],
    "an offer of h2c": ["--http2"],
    "HTTP/2": ["--http2-prior-knowledge"],
    "Expect": ["-H", "Expect: 100-continue"],
    "chunked": ["-H", CHUNKED],
    "compressed replies taken": ["--compressed"],
}


@needs("curl")
@pytest.mark.parametrize("options", CURL.values(), ids=CURL)
async def test_curl(doors, body, options):
    """curl works with its default content type (that of a form), with compressed and large bodies, and with several
    reads on one connection."""
    if "--http2-prior-knowledge" in options and doors.edge == "grpc":
        options = []  # this edge serves REST with aiohttp, which has no HTTP/2
    base = f"http://{doors.rest}"
    common = ["curl", "-sS", "--fail-with-body", "--path-as-is", *options]
    infer = f"{base}/v2/models/seven/infer"
    for url, more in (
        (infer, ["-d", f"@{body}/one"]),
        (infer, ["--data-binary", f"@{body}/packed", "-H", "Content-Encoding: gzip"]),
        (infer, ["-X", "POST", "-T", f"{body}/one"]),
    ):
        assert json.loads(await ran(*common, *more, url))["outputs"][0]["data"] == [7.0]
    large = await ran(*common, "-d", f"@{body}/large", f"{base}/v2/models/a%2Fslash/infer")
    assert json.loads(large)["outputs"][0]["data"] == list(range(200_000))
    urls = [f"{base}/v2/models/seven", f"{base}/v2/models/a%2Fslash", f"{base}/mesh/v1/models"]
    # curl 7.88 cannot keep a connection on which it spoke HTTP/2 with prior knowledge, to any server.
    turns = [[url] for url in urls] if "--http2-prior-knowledge" in options else [urls]
    reading = common[: -len(options)] if CHUNKED in options else common  # then curl sends no last chunk either
    found = "".join([await ran(*reading, *turn) for turn in turns])
    assert found.count('"inputs"') == 2
    assert '"resident"' in found


@needs("wget")
async def test_wget(doors, body):
    """wget works, although it sends a form's content type."""
    base = f"http://{doors.rest}"
    answer = await ran("wget", "-qO-", f"--post-file={body}/one", f"{base}/v2/models/seven/infer")
    assert json.loads(answer)["outputs"][0]["data"] == [7.0]
    assert "seven" in await ran("wget", "-qO-", f"{base}/mesh/v1/models")


@needs("ab", "apache2-utils")
@pytest.mark.parametrize("options", [[], ["-k"]], ids=["HTTP/1.0", "kept"])
async def test_ab(doors, body, options):
    """ab works over HTTP/1.0, with new connections and with kept ones: it reports neither failed requests nor statuses
    other than 2xx."""
    base = f"http://{doors.rest}"
    post = ["-p", f"{body}/one", "-T", "application/json"]
    for more in ([*post, f"{base}/v2/models/seven/infer"], [f"{base}/v2/models/seven"], [f"{base}/mesh/v1/models"]):
        told = await ran("ab", "-q", "-n", "40", "-c", "4", *options, *more)
        numbers = dict(line.split(":", 1) for line in told.splitlines() if ":" in line)
        assert numbers["Complete requests"].split() == ["40"], told
        assert numbers["Failed requests"].split() == ["0"], told
        assert "Non-2xx responses" not in numbers, told
        if options:
            assert numbers["Keep-Alive requests"].split() == ["40"], told


@needs("nginx")
async def test_nginx_in_front_of_rest(doors, tmp_path, body):
    """nginx works in front of REST: `proxy_pass` speaks HTTP/1.0 to the mesh, and nginx compresses the answers."""
    async with Nginx(doors.mesh, tmp_path / "nginx") as nginx:
        assert await ran(sys.executable, "-m", "tests.doors.pythons", "requests", nginx.rest) == "served\n"
        infer = f"http://{nginx.rest}/v2/models/a%2Fslash/infer"
        argv = ["curl", "-sS", "--compressed", "-D", f"{body}/head", "-d", f"@{body}/large", infer]
        if shutil.which("curl") is not None:
            assert json.loads(await ran(*argv))["outputs"][0]["shape"] == [200_000]
            assert "content-encoding: gzip" in (body / "head").read_text().lower()


@needs("nginx")
async def test_nginx_in_front_of_grpc(doors, tmp_path):
    """nginx works in front of gRPC with `grpc_pass`: small, large and compressed messages, an error with details, and a
    management call."""
    async with Nginx(doors.mesh, tmp_path / "nginx") as nginx:
        await asyncio.to_thread(_by_grpc, nginx.grpc)


def _by_grpc(address: str) -> None:
    with grpc.insecure_channel(address) as channel:
        v2 = inference_pb2_grpc.GRPCInferenceServiceStub(channel)
        assert v2.ServerReady(pb.ServerReadyRequest(), timeout=30).ready
        assert v2.ModelMetadata(pb.ModelMetadataRequest(name="seven"), timeout=30).inputs[0].name == "x"

        def infer(model: str, count: int, **how: object) -> bool:
            array = np.arange(count, dtype=np.float32)
            request = pb.ModelInferRequest(model_name=model, raw_input_contents=[array.tobytes()])
            request.inputs.add(name="x", datatype="FP32", shape=[count])
            return bool(v2.ModelInfer(request, timeout=60, **how).raw_output_contents[0] == array.tobytes())

        for _ in range(20):
            assert infer("a/slash", 16)
        assert infer("a/slash", 900_000)
        assert infer("a/slash", 100_000, compression=grpc.Compression.Gzip)
        with pytest.raises(grpc.RpcError) as error:
            infer("nobody", 1)
        assert error.value.code() is grpc.StatusCode.NOT_FOUND
        assert "grpc-status-details-bin" in dict(error.value.trailing_metadata())
        status = modelmesh_pb2_grpc.ModelMeshStub(channel).getModelStatus
        assert (
            status(modelmesh_pb2.GetStatusRequest(modelId="seven"), timeout=30).status
            == modelmesh_pb2.ModelStatusInfo.LOADED
        )


# --- programs that `make test-clients` makes


@made(clients.JAVA)
@pytest.mark.parametrize("name", ["apache", "java.net.http", "HttpURLConnection"])
async def test_javas_clients(doors, name):
    """Java's clients work. With each request Apache HttpClient offers an upgrade to TLS, and java.net.http one to
    HTTP/2."""
    assert await ran(*clients.JAVA.argv, name, doors.rest) == "served\n"


@made(clients.GO)
@pytest.mark.parametrize("name", ["http1", "h2c"])
async def test_gos_net_http(doors, name):
    if name == "h2c" and doors.edge == "grpc":
        return  # this edge serves REST with aiohttp, which has no HTTP/2
    assert await ran(*clients.GO.argv, name, doors.rest) == "served\n"


@made(clients.NODE)
@pytest.mark.parametrize("name", ["fetch", "http", "http2"])
async def test_nodes_clients(doors, name):
    if name == "http2" and doors.edge == "grpc":
        return
    assert await ran(*clients.NODE.argv, name, doors.rest) == "served\n"


@made(clients.NODE_GRPC)
async def test_grpc_js(doors):
    proto = REPOSITORY / "proto" / "inference.proto"
    assert await ran(*clients.NODE_GRPC.argv, str(proto), doors.grpc) == "served\n"


@made(clients.GRPCURL)
async def test_grpcurl(doors):
    """grpcurl works, and learns about the services only by reflection."""
    grpcurl = clients.GRPCURL.argv
    services = (await ran(*grpcurl, doors.grpc, "list")).split()
    assert {"inference.GRPCInferenceService", "mmesh.ModelMesh", "grpc.health.v1.Health"} <= set(services)
    tensor = {"name": "x", "datatype": "FP32", "shape": [1, 1], "contents": {"fp32_contents": [1]}}
    request = json.dumps({"model_name": "seven", "inputs": [tensor]})
    infer = "inference.GRPCInferenceService/ModelInfer"
    answer = json.loads(await ran(*grpcurl, "-d", request, doors.grpc, infer))
    assert answer["outputs"][0]["contents"] == {"fp32_contents": [7]}
    status = await ran(*grpcurl, "-d", '{"modelId": "seven"}', doors.grpc, "mmesh.ModelMesh/getModelStatus")
    assert json.loads(status)["status"] == "LOADED"
