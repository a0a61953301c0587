"""docs/kubernetes.md: its keys, names and examples match the chart."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy import manifests
from tests.deploy import installs

PAGE = manifests.ROOT.parent / "docs" / "kubernetes.md"
TEXT = PAGE.read_text()
VALUES = yaml.safe_load((manifests.CHART / "values.yaml").read_text())


def blocks(language: str) -> list[str]:
    """Returns the page's examples in a language."""
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


def test_links():
    """Every link in docs/kubernetes.md leads to an existing file and, if it names one, to an existing heading."""
    for target in re.findall(r"\]\(([^)]+)\)", TEXT):
        file, _, heading = target.partition("#")
        assert (PAGE.parent / Path(file)).exists(), target
        headings = re.findall(r"^#+ (.*)$", (PAGE.parent / Path(file)).read_text(), re.MULTILINE) if heading else []
        anchors = {re.sub(r"[^a-z0-9 -]", "", one.lower()).replace(" ", "-") for one in headings}
        assert not heading or heading in anchors, target


def test_keys():
    """Every key of the chart's values that docs/kubernetes.md names exists, as a path from the top or from a pool."""
    named = set(re.findall(r"`([a-z]+(?:\.[a-zA-Z]+)+)(?:=[^`]*)?`", TEXT))
    named |= set(re.findall(r"([a-z]+(?:\.[a-zA-Z]+)+)=", TEXT))
    others = {name for name in named if name.endswith((".crt", ".key", ".yaml", ".internal"))} | {"mmesh.ModelRuntime"}
    checked = 0
    for name in named - others:
        for root in (VALUES, VALUES["runtime"]):
            node: Any = root
            for part in name.split("."):
                node = node.get(part, ...) if isinstance(node, dict) else ...
            if node is not ...:
                break
        else:
            pytest.fail(f"{name} is in the docs and not in the values")
        checked += 1
    assert checked > 10


def test_objects():
    """The objects in the first table of docs/kubernetes.md exist under these names."""
    found = {f"{one['kind']} {one['metadata']['name']}" for one in installs.patched("base")}
    table = TEXT.split("| object |")[1].split("\n\n")[0]
    for kinds, name in re.findall(r"((?:[A-Z][A-Za-z]+(?: and )?)+) `([a-z-]+)(?:`|-POOL`)", table):
        for kind in kinds.split(" and "):
            if name == "mesh-runtime":
                name = "mesh-runtime-cpu"
            assert any(
                one == f"{kind} {name}" or (kind == "Job" and one.startswith(f"Job {name}-")) for one in found
            ), f"{kind} {name}"


def test_json_examples():
    """The example of etcd's connection in docs/kubernetes.md is valid JSON."""
    (connection,) = blocks("json")
    assert "endpoints" in json.loads(connection)


@installs.needs_helm
def test_pools_example():
    """The chart accepts the documented examples of pools and makes the pools in them."""
    pools, preset, with_server = [block for block in blocks("yaml") if block.startswith("pools:")]
    found = installs.rendered(f"pools={json.dumps(yaml.safe_load(with_server)['pools'])}")
    example = installs.one(found, "Deployment", "mesh-runtime-example")["spec"]["template"]["spec"]
    assert [one["name"] for one in example["initContainers"]] == ["server"]
    found = installs.rendered(f"pools={json.dumps(yaml.safe_load(preset)['pools'])}")
    (server,) = installs.one(found, "Deployment", "mesh-runtime-sklearn")["spec"]["template"]["spec"]["initContainers"]
    assert "mlserver" in server["image"]
    found = installs.rendered(f"pools={json.dumps(yaml.safe_load(pools)['pools'])}")
    big = installs.one(found, "Deployment", "mesh-runtime-big")["spec"]["template"]["spec"]
    assert installs.env(big["containers"][0])["MESH_LABELS"] == "big-memory"
    assert installs.one(found, "Deployment", "mesh-runtime-cpu")["spec"]["replicas"] == 3


def test_kustomize_example():
    """The documented kustomize example names existing folders in the required order."""
    (text,) = [block for block in blocks("yaml") if block.startswith("namespace:")]
    example = yaml.safe_load(text)
    for folder in example["resources"] + example["components"]:
        assert (manifests.ROOT.parent / folder / "kustomization.yaml").exists()
    names = [folder.rpartition("/")[2] for folder in example["components"]]
    assert names == [name for name in manifests.COMPONENTS if name in names]
    listed = ", ".join(f"`{name}`" for name in manifests.COMPONENTS[:-1]) + f" and `{manifests.COMPONENTS[-1]}`"
    assert listed in " ".join(TEXT.split())
    images = {container["image"].rpartition(":")[0] for _, container in installs.containers(installs.patched("gpu"))}
    assert {image["name"] for image in example["images"]} == images
