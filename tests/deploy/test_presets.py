"""Pools with a preset: the chart fills in the values of the model server, and a pool's own values override them."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy import manifests
from mesh.modelservers import kinds, ovms
from tests.deploy import installs

PRESETS = yaml.safe_load((manifests.CHART / "files" / "presets.yaml").read_text())
SCHEMA = json.loads((manifests.CHART / "values.schema.json").read_text())
ALL = pytest.mark.parametrize("preset", PRESETS)

pytestmark = installs.needs_helm


def pod_of(*sets: str, **pool: Any) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Returns the pod of a pool with these values, its server, and its agent."""
    if pool.get("preset") in kinds.KINDS and not kinds.KINDS[pool["preset"]].types:
        pool.setdefault("allowCode", True)
    found = installs.rendered(f"pools={json.dumps([{'name': 'p', **pool}])}", *sets)
    spec = installs.one(found, "Deployment", "mesh-runtime-p")["spec"]["template"]["spec"]
    return spec, spec["initContainers"][-1], spec["containers"][0]


def refusal(**pool: Any) -> str:
    """Returns the error with which Helm refuses a pool."""
    with pytest.raises(manifests.Failed) as caught:
        pod_of(**pool)
    return str(caught.value)


def test_presets_are_those_of_the_schema():
    """The schema accepts exactly the presets that exist, and each is a kind of server that has an adapter."""
    pool, server = (SCHEMA["$defs"][name]["properties"] for name in ("pool", "server"))
    assert pool["preset"]["enum"] == ["", *PRESETS]
    assert [preset["adapter"] for preset in PRESETS.values()] == list(PRESETS)
    assert set(PRESETS) <= set(server["adapter"]["enum"]) <= set(kinds.KINDS)


@ALL
def test_a_preset_is_all_that_a_pool_needs(preset: str):
    """The server has the preset's image, command, environment, ports and probes. The agent reaches the server on
    loopback, and knows its kind and its memory."""
    _, server, agent = pod_of(preset=preset)
    wanted = PRESETS[preset]
    for key in ("image", "command", "args", "env", "ports"):
        assert server.get(key) == wanted.get(key)
    for name in ("startup", "readiness", "liveness"):
        assert server.get(f"{name}Probe") == wanted["probes"].get(name)
    env = installs.env(agent)
    assert env["MESH_ADAPTER"] == preset
    assert env["MESH_SERVER"] == wanted["spi"]
    assert env["MESH_SERVER"].startswith("127.0.0.1:"), "no other pod can reach the server"
    assert env.get("MESH_SERVER_CALLS") == wanted.get("calls")
    assert env.get("MESH_SERVER_REST") == wanted.get("rest")
    assert env["MESH_SERVER_MEMORY_LIMIT"] == {
        "resourceFieldRef": {"containerName": server["name"], "resource": "limits.memory"}
    }
    assert "MESH_TYPES" not in env, "the agent knows which types its kind of server takes"
    assert ("MESH_ALLOW_CODE" in env) == (not kinds.KINDS[preset].types)


@ALL
def test_server_and_agent_share_the_folder_of_models_at_one_path(preset: str):
    """The server finds the models' files, and its own folder of models, under the paths that the agent uses. It can
    write to neither."""
    _, server, agent = pod_of(preset=preset, claims=["team"])
    agents = {mount["mountPath"]: mount for mount in agent["volumeMounts"]}
    servers = {mount["mountPath"]: mount for mount in server["volumeMounts"]}
    env = installs.env(agent)
    for path in (env["MESH_MODEL_DIR"], env["MESH_SERVER_MODELS"], "/pvc_mounts/team"):
        assert servers[path]["name"] == agents[path]["name"]
        assert servers[path]["readOnly"] is True
    assert env["MESH_SERVER_MODELS"] in json.dumps([server.get("command"), server.get("args"), server.get("env")])
    assert server["securityContext"]["readOnlyRootFilesystem"] is True


@ALL
def test_the_server_has_a_user_of_its_own_whose_memory_the_agent_sees(preset: str):
    """The agent and the server share the process namespace but have different users, so that the server cannot read the
    agent's memory and Secrets. If the cluster assigns the user, they do not share the namespace."""
    spec, server, agent = pod_of(preset=preset)
    assert spec["shareProcessNamespace"] is True
    assert (
        server["securityContext"]["runAsUser"] == PRESETS[preset]["runAsUser"] != spec["securityContext"]["runAsUser"]
    )
    assert "runAsUser" not in agent["securityContext"]
    none = 'podSecurity={"runAsUser":null,"runAsGroup":null,"fsGroup":null}'
    for spec, server, _ in (
        pod_of(none, preset=preset),
        pod_of(preset=preset, server={"runAsUser": None}),
        pod_of(preset=preset, server={"runAsUser": 10001}),
    ):
        assert "shareProcessNamespace" not in spec
        assert "runAsUser" not in server["securityContext"]


@ALL
def test_a_pool_overrides_each_value_of_a_preset(preset: str):
    """A pool's own values have precedence over the preset's. Variables, ports and mounts are merged by their names."""
    variable = PRESETS[preset].get("env", [{"name": "A"}])[0]["name"]
    own = {
        "image": "mine:1",
        "pullPolicy": "Never",
        "types": ["sklearn"],
        "spi": "127.0.0.1:9001",
        "calls": "127.0.0.1:9002",
        "command": ["mine"],
        "args": ["--x"],
        "runAsUser": 4711,
        "env": [{"name": variable, "value": "own"}, {"name": "MORE", "value": "1"}],
        "ports": [{"name": "more", "containerPort": 9001}],
        "probes": {"startup": None, "liveness": {"exec": {"command": ["true"]}}},
        "volumeMounts": [{"name": "more", "mountPath": "/more"}],
        "writable": [{"mountPath": "/cache", "sizeLimit": "1Gi"}],
        "readOnlyRootFilesystem": False,
    }
    _, server, agent = pod_of(preset=preset, server=own, extraVolumes=[{"name": "more", "emptyDir": {}}])
    for key in ("image", "command", "args"):
        assert server[key] == own[key]
    given, before = installs.env(server), installs.env(PRESETS[preset])
    assert given == {**before, variable: "own", "MORE": "1"}
    assert len(server["env"]) == len(given), "each variable is there once"
    assert [port["name"] for port in server["ports"]] == [*(one["name"] for one in PRESETS[preset]["ports"]), "more"]
    assert "startupProbe" not in server
    assert server["livenessProbe"]["exec"] == {"command": ["true"]}
    assert server["imagePullPolicy"] == "Never"
    assert server["securityContext"]["readOnlyRootFilesystem"] is False
    assert server["securityContext"]["runAsUser"] == 4711
    assert {"name": "more", "mountPath": "/more"} in server["volumeMounts"]
    folders = {one["mountPath"] for one in PRESETS[preset].get("writable", ())} | {"/cache", "/more"}
    assert folders <= {mount["mountPath"] for mount in server["volumeMounts"]}
    env = installs.env(agent)
    assert (env["MESH_SERVER"], env["MESH_SERVER_CALLS"], env["MESH_TYPES"]) == (own["spi"], own["calls"], "sklearn")


@ALL
def test_further_folders_are_writable_without_a_writable_file_system(preset: str):
    """Each folder in `writable` is a separate volume with a limit, in addition to the preset's folders."""
    own = [{"mountPath": "/cache", "sizeLimit": "2Gi"}, {"mountPath": "/fast", "sizeLimit": "1Gi", "medium": "Memory"}]
    spec, server, agent = pod_of(preset=preset, server={"writable": own})
    volumes = {volume["name"]: volume.get("emptyDir") for volume in spec["volumes"]}
    mounted = {mount["mountPath"]: mount for mount in server["volumeMounts"]}
    for one in [*PRESETS[preset].get("writable", ()), *own]:
        mount = mounted[one["mountPath"]]
        assert "readOnly" not in mount
        assert volumes[mount["name"]] == {key: one[key] for key in ("sizeLimit", "medium") if key in one}
        assert mount["name"] not in {mount["name"] for mount in agent["volumeMounts"]}


def test_triton_has_the_gpus_of_a_pool_and_tells_their_memory():
    """The server's container has the GPUs of a pool, and the agent reads their memory from Triton's metrics. Without
    GPUs, the agent reads no metrics."""
    _, server, agent = pod_of(preset="triton", gpu={"count": 1})
    assert server["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert "nvidia.com/gpu" not in agent["resources"]["limits"]
    env = installs.env(agent)
    assert env["MESH_SERVER_METRICS"] == PRESETS["triton"]["metrics"]
    port = env["MESH_SERVER_METRICS"].rpartition(":")[2]
    assert f"--metrics-port={port}" in server["args"]
    assert env["MESH_LABELS"] == "gpu"
    assert "gpu" not in agent["image"]
    _, _, agent = pod_of(preset="triton")
    assert "MESH_SERVER_METRICS" not in installs.env(agent)


def test_ovms_listens_where_the_agent_expects_it_and_waits_for_its_configuration():
    """OVMS's ports are those of the agent's addresses, on loopback only. OVMS reads the file that the agent writes."""
    _, server, agent = pod_of(preset="ovms")
    env, args = installs.env(agent), server["args"]
    assert f"--port={env['MESH_SERVER'].rpartition(':')[2]}" in args
    assert f"--rest_port={env['MESH_SERVER_REST'].rpartition(':')[2]}" in args
    assert {"--grpc_bind_address=127.0.0.1", "--rest_bind_address=127.0.0.1"} <= set(args)
    file = f"{env['MESH_SERVER_MODELS']}/models/{ovms.FILE}"
    assert f"--config_path={file}" in args
    assert f"until [ -f {file} ]" in server["command"][2]


def test_a_preset_for_all_pools():
    """A preset and values of its server may be set for all pools. A single pool may change them, or use the ONNX server
    instead."""
    common = 'runtime={"preset":"mlserver","server":{"image":"all:1","pullPolicy":"Never"}}'
    _, server, _ = pod_of(common, server={"image": "one:1"})
    assert (server["image"], server["imagePullPolicy"]) == ("one:1", "Never")
    assert server["command"] == PRESETS["mlserver"]["command"]
    found = installs.rendered(
        common.replace(',"server":{"image":"all:1","pullPolicy":"Never"}', ""), 'pools=[{"name":"p","preset":""}]'
    )
    assert "initContainers" not in installs.one(found, "Deployment", "mesh-runtime-p")["spec"]["template"]["spec"]


def test_code_runs_only_where_a_pool_allows_it():
    """A pool's `allowCode` becomes an option of its agents, and is only permitted for a server with an adapter."""
    _, _, agent = pod_of(preset="mlserver", allowCode=True)
    assert installs.env(agent)["MESH_ALLOW_CODE"] == "true"
    assert "allowCode has no effect" in refusal(allowCode=True)
    assert "all models of TorchServe run code" in refusal(preset="torchserve", allowCode=False)
    text = refusal(allowCode=True, server={"image": "a", "types": ["t"], "spi": "127.0.0.1:1"})
    assert "Set a preset, or remove allowCode" in text


def test_refusals_say_what_to_do():
    """An unknown preset is refused, and the error lists the existing ones. A server without a preset needs an image,
    types and an address. No server may have a port of the agent, and only OVMS has `rest`."""
    text = refusal(preset="jboss")
    assert "preset" in text
    assert "mlserver" in text
    for missing in ("image", "types", "spi"):
        server = {"image": "a", "types": ["t"], "spi": "127.0.0.1:1"}
        del server[missing]
        text = refusal(server=server)
        assert f"server.{missing} is missing" in text
        assert "or set the pool's preset" in text
    assert "listens on port 8085" in refusal(preset="mlserver", server={"calls": "127.0.0.1:8085"})
    assert "listens on port 8086" in refusal(preset="ovms", server={"rest": "127.0.0.1:8086"})
    assert "server.rest is missing" in refusal(server={"image": "a", "adapter": "ovms", "spi": "127.0.0.1:1"})
    assert "only has an effect with adapter ovms" in refusal(preset="triton", server={"rest": "127.0.0.1:1"})


@ALL
def test_the_docs_have_the_presets_images_and_types(preset: str):
    """The table in docs/kubernetes.md has the image of each preset, and the types that servers of its kind take."""
    page = (manifests.ROOT.parent / "docs" / "kubernetes.md").read_text()
    (row,) = [line for line in page.splitlines() if line.startswith(f"| `{preset}` | `")]
    image, types, code = (set(re.findall(r"`([^`]+)`", cell)) for cell in row.split("|")[2:5])
    kind = kinds.KINDS[preset]
    assert (image, types, code) == ({PRESETS[preset]["image"]}, set(kind.types), set(kind.code_types))


@ALL
def test_the_commands_of_probes_time_out_before_kubernetes_does(preset: str):
    """A probe may take at least five seconds instead of Kubernetes' default of one. The liveness probe tolerates a load
    of any permitted length."""
    for name, probe in PRESETS[preset]["probes"].items():
        assert probe["timeoutSeconds"] >= 5
        if name == "liveness":
            load = yaml.safe_load(Path(manifests.CHART / "values.yaml").read_text())["runtime"]["loadTimeout"]
            assert probe["periodSeconds"] * probe["failureThreshold"] > 2 * load
