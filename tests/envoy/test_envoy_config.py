import json
import subprocess
from dataclasses import replace

import pytest

from mesh import process
from mesh.envoy import certificates, config

SETTINGS = config.EnvoySettings(
    host="127.0.0.1",
    port=8033,
    admin_socket="/tmp/m/admin",
    grpc_sockets=("/tmp/m/g0", "/tmp/m/g1"),
    inference_sockets=("/tmp/m/i0", "/tmp/m/i1"),
    rest_sockets=("/tmp/m/r0", "/tmp/m/r1"),
)


def values(tree, name):
    """Yields every value under this name, at any depth of the configuration."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            if key == name:
                yield value
            yield from values(value, name)
    elif isinstance(tree, list):
        for item in tree:
            yield from values(item, name)


def clusters(settings=SETTINGS):
    return {cluster["name"]: cluster for cluster in config.bootstrap(settings)["static_resources"]["clusters"]}


def test_it_is_plain_json():
    assert json.loads(config.encode(SETTINGS)) == config.bootstrap(SETTINGS)


def test_each_kind_of_call_goes_to_its_own_sockets():
    for name, sockets in (
        (config.GRPC_CLUSTER, SETTINGS.grpc_sockets),
        (config.INFERENCE_CLUSTER, SETTINGS.inference_sockets),
        (config.REST_CLUSTER, SETTINGS.rest_sockets),
    ):
        assert tuple(pipe["path"] for pipe in values(clusters()[name], "pipe")) == sockets


def test_routes_are_matched_from_grpc_to_everything():
    """A gRPC call is never routed as REST, whatever its path. POST requests below /v2/models/ are routed as inference.
    Only the routes that lead to management add the client's address."""
    (virtual_hosts,) = values(config.bootstrap(SETTINGS), "virtual_hosts")
    *managing, first, second, third = virtual_hosts[0]["routes"]
    assert {route["route"]["cluster"] for route in managing} == {config.GRPC_CLUSTER}
    assert {route["match"]["prefix"] for route in managing} == {
        "/mmesh.ModelMesh/",
        "/com.ibm.watson.tas.proto.TasRuntime/",
    }
    told = [route for route in virtual_hosts[0]["routes"] if "request_headers_to_add" in route]
    assert told == [*managing, third]
    assert (first["match"], first["route"]["cluster"]) == ({"prefix": "/", "grpc": {}}, config.GRPC_CLUSTER)
    assert (second["match"]["prefix"], second["route"]["cluster"]) == ("/v2/models/", config.INFERENCE_CLUSTER)
    assert (third["match"], third["route"]["cluster"]) == ({"prefix": "/"}, config.REST_CLUSTER)


def test_the_admin_interface_is_on_a_private_socket_only():
    assert config.bootstrap(SETTINGS)["admin"]["address"] == {"pipe": {"path": "/tmp/m/admin", "mode": 0o600}}
    assert [a["port_value"] for a in values(config.bootstrap(SETTINGS), "socket_address")] == [8033]


def test_no_call_is_timed_out_by_envoy_and_only_connecting_is_retried():
    tree = config.bootstrap(SETTINGS)
    for route in values(tree, "route"):
        assert route["timeout"] == "0s"
        assert route["retry_policy"]["retry_on"] == "connect-failure"


def test_every_threshold_of_the_circuit_breakers_is_raised():
    for cluster in clusters(replace(SETTINGS, max_calls=5000)).values():
        (threshold,) = cluster["circuit_breakers"]["thresholds"]
        assert set(threshold.values()) == {5000}
        assert len(threshold) == 4


def test_no_management_server_and_no_names_to_resolve():
    text = config.encode(SETTINGS).decode()
    assert "dynamic_resources" not in text
    assert "xds" not in text.lower()
    assert {cluster["type"] for cluster in clusters().values()} == {"STATIC"}


def test_long_socket_paths_are_refused_with_the_remedy():
    long = "/tmp/" + "x" * 95
    assert len(long) == config.MAX_SOCKET_PATH
    for settings in (
        replace(SETTINGS, admin_socket=long),
        replace(SETTINGS, grpc_sockets=("/tmp/g", long)),
        replace(SETTINGS, inference_sockets=(long,)),
        replace(SETTINGS, rest_sockets=(long,)),
    ):
        with pytest.raises(ValueError, match="shorter run directory"):
            config.bootstrap(settings)
    config.bootstrap(replace(SETTINGS, admin_socket=long[:-1]))


@pytest.mark.parametrize("name", ["grpc_sockets", "inference_sockets", "rest_sockets"])
def test_no_workers_is_refused(name):
    with pytest.raises(ValueError, match="at least one worker"):
        config.bootstrap(replace(SETTINGS, **{name: ()}))


@pytest.mark.parametrize("files", [0, 256, 1024, 20_000, 1 << 20])
def test_bounds_fit_into_the_open_files(files):
    fitted = config.fit(SETTINGS, files)
    assert 0 < fitted.max_connections <= SETTINGS.max_connections
    assert 0 < fitted.max_calls <= SETTINGS.max_calls
    if files >= 256:
        assert fitted.max_connections + fitted.max_calls <= files
    if files == 1 << 20:
        assert fitted == SETTINGS


@pytest.fixture
def certificate(tmp_path):
    make = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 1 -subj /CN=localhost"
    argv = [*make.split(), "-keyout", str(tmp_path / "key"), "-out", str(tmp_path / "cert")]
    subprocess.run(argv, check=True, capture_output=True)
    return config.Tls(certificate=str(tmp_path / "cert"), private_key=str(tmp_path / "key"))


def test_connections_that_began_together_do_not_end_together():
    """Connections end at an age to which Envoy adds up to 20 % at random. Without a requested age they do not end."""
    tree = config.bootstrap(replace(SETTINGS, max_connection_age=300))
    assert list(values(tree, "max_connection_duration")) == ["300.000s"]
    assert list(values(tree, "max_connection_duration_jitter")) == [{"value": 20}]
    assert not list(values(config.bootstrap(SETTINGS), "max_connection_duration_jitter"))


@pytest.mark.parametrize("variant", ["plain", "everything", "mutual", "optional"])
def test_envoy_itself_accepts_it(tmp_path, certificate, variant):
    settings = SETTINGS
    if variant != "plain":
        settings = replace(
            settings, tls=certificate, secrets_dir=str(tmp_path), heap=1 << 30, max_connection_age=600, concurrency=4
        )
    if variant in ("mutual", "optional"):
        shown = replace(certificate, client_ca=certificate.certificate, client_optional=variant == "optional")
        settings = replace(settings, tls=shown)
    if settings.tls is not None:
        certificates.Certificates(settings.tls, tmp_path).start()
    path = tmp_path / "envoy.json"
    path.write_bytes(config.encode(settings))
    argv = [
        process.find_binary("envoy"),
        "--mode",
        "validate",
        "-c",
        str(path),
        "--disable-hot-restart",
        "-l",
        "warning",
    ]
    result = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stderr
    complaints = [line for line in result.stderr.splitlines() if "[warning]" in line or "deprecated" in line.lower()]
    assert not complaints
