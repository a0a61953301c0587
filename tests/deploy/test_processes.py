"""The pods' settings for Mesh's processes: options exist, files are mounted, certificates contain the names."""

import json
import re
from typing import Any
from urllib.parse import urlsplit

import pytest
import typer.core
import typer.main

from mesh.cli import app as cli
from mesh.cli.client import DEFAULT_ENDPOINT
from mesh.options import values
from mesh.runtime.__main__ import app as runtime
from router.__main__ import app as router
from tests.deploy import installs


def options(app: typer.Typer) -> set[str]:
    """Returns the environment variables that a process reads."""
    found: set[str] = set()
    for parameter in typer.main.get_command(app).params:
        given = parameter.envvar or []
        found |= {given} if isinstance(given, str) else set(given)
    return found


@pytest.fixture(params=installs.ALL)
def found(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    return installs.load(request.param)


FOR_COMMANDS = {"MESH_API_KEY_FILE", "MESH_ENDPOINT"}
"""Variables of a router's container for `mesh` commands that are run in it."""


def test_options(found):
    """Each MESH_ variable is an option of the process that gets it. A typo would be ignored silently."""
    known = {"router": options(router) | FOR_COMMANDS, "runtime": options(runtime)}
    assert options(cli.build()) >= FOR_COMMANDS
    for name, container in installs.containers(found):
        if container["name"] in known:
            given = {key for key in installs.env(container) if key.startswith("MESH_")}
            assert given <= known[container["name"]], name
            assert container["args"] == [container["name"]]


def test_commands_in_a_routers_pod_reach_management(found):
    """`mesh` in a router's pod connects, by default, to the port that serves management."""
    env = installs.env(installs.one(found, "Deployment", "mesh-router")["spec"]["template"]["spec"]["containers"][0])
    managed = values.parse_address(env.get("MESH_MANAGEMENT_LISTEN", env["MESH_LISTEN"]))
    endpoint = urlsplit(env.get("MESH_ENDPOINT", DEFAULT_ENDPOINT))
    assert endpoint.port == managed[1]
    if "MESH_ENDPOINT" in env:
        assert endpoint.scheme == ("https" if "MESH_TLS_CERT" in env else "http")


def test_jobs(found):
    """A job's command exists, and has the options that the job gives."""
    jobs = [one for one in found if one["kind"] in ("Job", "CronJob")]
    for _, container in installs.containers(jobs):
        command, arguments = typer.main.get_command(cli.build()), list(container["args"])
        while isinstance(command, typer.core.TyperGroup):
            command = command.commands[arguments.pop(0)]
        command.make_context(command.name, arguments).close()


def test_values_are_read(found):
    """Sizes and addresses have formats that the processes can parse."""
    for _, container in installs.containers(found):
        env = installs.env(container)
        for name in (
            "MESH_DISK_BUDGET",
            "MESH_MAX_MESSAGE",
            "MESH_MAX_BODY_BYTES",
            "MESH_MIN_BODY_RATE",
            "MESH_EDGE_MEMORY",
        ):
            if env.get(name, "auto") != "auto":
                assert values.parse_bytes(env[name]) > 0
        for name in ("MESH_LISTEN", "MESH_MANAGEMENT_LISTEN", "MESH_PROBE", "MESH_DATA", "MESH_CONTROL"):
            if name in env:
                host, port = values.parse_address(env[name])
                assert (host, port) == ("0.0.0.0", port)
                assert port in [one["containerPort"] for one in container["ports"]]


def test_variables_come_first(found):
    """$(NAME) refers to a variable that is defined before. Otherwise Kubernetes would silently leave it as it is."""
    for name, container in installs.containers(found):
        seen: set[str] = set()
        for one in container.get("env", ()):
            for used in re.findall(r"\$\(([A-Z_]+)\)", str(one.get("value", ""))):
                assert used in seen, f"{name}: {one['name']}"
            assert one["name"] not in seen, f"{name}: {one['name']} twice"
            seen.add(one["name"])
        for argument in container.get("args", ()):
            assert set(re.findall(r"\$\(([A-Z_]+)\)", argument)) <= seen, name


def test_files_are_mounted(found):
    """Every path in an environment variable lies in a mounted volume."""
    for name, container in installs.containers(found):
        folders = [mount["mountPath"] for mount in container["volumeMounts"]]
        for key, value in installs.env(container).items():
            if isinstance(value, str) and value.startswith("/"):
                # A folder of volumes, such as that of the claims, is above its mounts.
                lies = [f"{value}/".startswith(f"{folder}/") or folder.startswith(f"{value}/") for folder in folders]
                assert any(lies), f"{name}: {key}={value}"


def test_disk_budget_fits(found):
    """The file cache's limit is below the volume's limit, at which Kubernetes would evict the pod."""
    units = {"Gi": 2**30, "Mi": 2**20}
    for _, pod in installs.pods(found):
        for container in pod["spec"]["containers"]:
            budget = installs.env(container).get("MESH_DISK_BUDGET")
            if budget:
                (volume,) = [one for one in pod["spec"]["volumes"] if one["name"] == "models"]
                size = (volume.get("emptyDir") or {}).get("sizeLimit") or volume["ephemeral"]["volumeClaimTemplate"][
                    "spec"
                ]["resources"]["requests"]["storage"]
                whole = int(size[:-2]) * units[size[-2:]]
                assert 0.8 * whole < int(budget) <= 0.9 * whole


def test_etcd_and_its_clients_agree(found):
    """Clients reach etcd's members under names in the members' certificate, with files that are mounted."""
    stateful = [one for one in found if one["kind"] == "StatefulSet"]
    secrets = [one for one in found if one["metadata"]["name"] == "mesh-etcd-connection"]
    assert len(stateful) == len(secrets)
    if not stateful:
        for _, pod in installs.pods(found):
            for volume in pod["spec"].get("volumes", ()):
                if volume["name"] == "etcd-connection":
                    assert volume["secret"]["secretName"] == "model-serving-etcd"
        return
    connection = json.loads(secrets[0]["stringData"]["etcd_connection"])
    env = installs.env(stateful[0]["spec"]["template"]["spec"]["containers"][0])
    hosts = re.findall(r"//([^:]+):2379", connection["endpoints"])
    members = re.findall(r"([^,=]+)=(https?)://([^:]+):2380", env["ETCD_INITIAL_CLUSTER"])
    assert [f"{name}.{stateful[0]['spec']['serviceName']}" for name, _, _ in members] == [host for *_, host in members]
    assert hosts == [host for *_, host in members]
    assert len(members) == stateful[0]["spec"]["replicas"]
    secure = "ETCD_CERT_FILE" in env
    assert connection["endpoints"].startswith("https:") is secure
    assert ("certificate_file" in connection) is secure
    for _, container in installs.containers(found):
        if container["name"] == "certificates":
            names = {argument.partition("=")[2] for argument in container["args"] if argument.startswith("--dns=")}
            assert {"mesh.internal", *hosts} <= names
    for _, pod in installs.pods(found):
        for volume in pod["spec"].get("volumes", ()):
            if volume["name"] == "etcd-connection":
                files = {
                    item["path"]
                    for source in volume["projected"]["sources"]
                    for item in source["secret"].get("items", [{"path": "etcd_connection"}])
                }
                assert {value for key, value in connection.items() if key.endswith("_file")} | {
                    "etcd_connection"
                } == files


def test_authority_stays_home(found):
    """No pod has the authority's private key: volumes of its Secret list the three files that they contain."""
    for name, pod in installs.pods(found):
        for volume in pod["spec"].get("volumes", ()):
            sources = [one["secret"] for one in volume.get("projected", {}).get("sources", ())]
            sources += [volume["secret"]] if "secret" in volume else []
            for secret in sources:
                if "internal" in (secret.get("name") or secret.get("secretName")):
                    assert {item["key"] for item in secret["items"]} == {"ca.crt", "tls.crt", "tls.key"}, name
