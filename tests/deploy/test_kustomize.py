"""Kustomize's files are made from the chart and install the same mesh."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy import manifests
from tests.deploy import installs

KUSTOMIZE = shutil.which("kustomize") or shutil.which("kustomize", path=str(manifests.ROOT.parent / ".cache" / "bin"))
needs_kustomize = pytest.mark.skipif(
    KUSTOMIZE is None, reason="NOT CHECKED: there is no kustomize (PATH, .cache/bin); only our own patching was tested"
)


def build(folder: Path) -> list[dict[str, Any]]:
    """Runs kustomize and returns its output."""
    command = [str(KUSTOMIZE), "build", "--load-restrictor", "LoadRestrictionsNone", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


def alike(value: Any) -> Any:
    """Returns the objects without irrelevant differences: the order of objects and named items, and Helm's labels."""
    value = manifests.neutral(value)

    def plain(node: Any) -> Any:
        if isinstance(node, dict):
            return {key: plain(one) for key, one in node.items()}
        if isinstance(node, list):
            several = [plain(one) for one in node]
            named = several and all(isinstance(one, dict) and "name" in one for one in several)
            return sorted(several, key=lambda one: one["name"]) if named else several
        return node

    return {manifests.key(one): plain(one) for one in value}


def test_fresh():
    """Kustomize's files were made from the current chart."""
    assert manifests.check() is None


@pytest.mark.parametrize("what", ["source", "made", "sums"])
def test_stale(what: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """`--check` finds a changed chart, a file that was changed by hand, and missing checksums."""
    copy = tmp_path / "kustomize"
    shutil.copytree(manifests.KUSTOMIZE, copy)
    monkeypatch.setattr(manifests, "KUSTOMIZE", copy)
    assert manifests.check() is None
    if what == "source":
        known = manifests.sources()
        monkeypatch.setattr(manifests, "sources", lambda: {**known, "values/more.yaml": b""})
        word = "make manifests"
    elif what == "made":
        with (copy / "base" / "router.yaml").open("a") as file:
            file.write("# by hand\n")
        word = "by hand"
    else:
        (copy / manifests.SUMS).unlink()
        word = "missing"
    assert word in str(manifests.check())


@installs.needs_helm
def test_made_again():
    """Making the files again changes none of them."""
    there = {path: content.decode() for path, content in manifests.made().items()}
    assert manifests.manifests() == there


@installs.needs_helm
@pytest.mark.parametrize("name", manifests.COMPONENTS)
def test_component_is_the_chart_with_its_values(name: str):
    """The base with a component equals the chart with the values from which the component was made."""
    assert alike(installs.patched(name)) == alike(installs.rendered(values=f"{name}.yaml"))


@installs.needs_helm
def test_components_go_together():
    """Several components together equal the chart with all of their values."""
    sets = [
        f"{key}={json.dumps(value)}"
        for name in ("gpu", "external-etcd", "tls")
        for key, value in yaml.safe_load((manifests.VALUES / f"{name}.yaml").read_text()).items()
    ]
    assert alike(installs.patched("gpu", "external-etcd", "tls")) == alike(installs.rendered(*sets))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        pytest.param({"a": 1, "b": {"c": 2}}, {"b": {"c": 3, "d/~": 4}}, id="dicts"),
        pytest.param({"l": [1, 2]}, {"l": [2]}, id="list"),
        pytest.param(
            {"env": [{"name": "a", "value": "1"}, {"name": "b"}, {"name": "c"}]},
            {"env": [{"name": "a", "value": "2"}, {"name": "c"}, {"name": "d"}]},
            id="named",
        ),
    ],
)
def test_difference(old: Any, new: Any):
    """Applying a generated patch to the old object yields the new one."""
    for operation in manifests.difference(old, new):
        installs.apply(operation, old)
    assert old == new


@needs_kustomize
@pytest.mark.parametrize("name", installs.PATCHED)
def test_real_kustomize(name: str):
    """Kustomize yields the same objects as the tests' own patching."""
    folder = manifests.KUSTOMIZE / ("base" if name == "base" else f"overlays/{name}")
    assert alike(build(folder)) == alike(installs.patched(name))


@needs_kustomize
def test_real_kustomize_with_several(tmp_path: Path):
    """With several components, a namespace and custom images, as in the docs, kustomize makes objects of the same kinds
    and names as the tests' own patching. All are in that namespace and use those images."""
    kustomization = {
        "namespace": "team-a",
        "resources": [str(manifests.KUSTOMIZE / "base")],
        "components": [str(manifests.KUSTOMIZE / "components" / name) for name in ("gpu", "external-etcd", "tls")],
        "images": [
            {"name": "mesh", "newName": "registry.example.com/mesh", "newTag": "9"},
            {"name": "mesh-gpu", "newName": "registry.example.com/mesh-gpu", "newTag": "9"},
        ],
    }
    # Kustomize takes relative paths only.
    up = "../" * len(tmp_path.parts[1:])
    for key in ("resources", "components"):
        kustomization[key] = [up + str(path).lstrip("/") for path in kustomization[key]]
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
    found = build(tmp_path)
    assert {one["metadata"]["namespace"] for one in found} == {"team-a"}
    binding = installs.one(found, "RoleBinding", "mesh-certificates")
    assert binding["subjects"] == [{"kind": "ServiceAccount", "name": "mesh-certificates", "namespace": "team-a"}]
    images = {container["image"] for _, container in installs.containers(found)}
    assert images == {"registry.example.com/mesh:9", "registry.example.com/mesh-gpu:9"}
    here = installs.patched("gpu", "external-etcd", "tls")
    assert {manifests.key(one) for one in found} == {manifests.key(one) for one in here}
