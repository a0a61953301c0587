"""`make manifests`: the kustomize base and its components, rendered from the Helm chart.

The chart is the only source. The base is the chart rendered with its default values. A component is the difference that
a file in `deploy/values/` makes: added objects, removed objects, and JSON patches for changed ones; an overlay is the
base with one component. So several components can be combined over the base, and tests compare the result with the
chart rendered from the same files.

Rendering needs Helm, which most contributors do not have. Freshness is therefore checked by checksums (`--check`): one
over the sources of the manifests, one over the manifests. If Helm is available, a test renders and compares all of it.
"""

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent
CHART = ROOT / "chart" / "mesh"
VALUES = ROOT / "values"
KUSTOMIZE = ROOT / "kustomize"
SUMS = "sums.txt"
COMPONENTS = ("trial", "gpu", "mlserver", "external-etcd", "tls")
"""The components, in their order of application: each may change what earlier ones have added."""

KUBERNETES = "1.35.0"  # the Kubernetes version to render for; no template depends on it
NAMESPACE = "mesh"  # only appears in the subject of the RoleBinding
HEADER = "# Made from deploy/chart by `make manifests`: change the chart, not this file.\n"

Document = dict[str, Any]

LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast, if libyaml is installed


class Failed(Exception):
    """A failure to render the manifests. The text is for the user."""


def helm() -> str | None:
    """Returns the path of Helm, from $HELM, PATH or .cache/bin, or None if it is in none of them."""
    named = os.environ.get("HELM")
    return named or shutil.which("helm") or shutil.which("helm", path=str(ROOT.parent / ".cache" / "bin"))


def render(*files: Path, sets: Sequence[str] = (), namespace: str = NAMESPACE) -> dict[str, list[Document]]:
    """Returns the chart's rendered objects, by the name of the template. Raises Failed without Helm, or with Helm's
    error if Helm refuses the values."""
    program = helm()
    if program is None:
        raise Failed("helm is neither in $HELM nor on PATH nor in .cache/bin: install Helm 3.14 or later (helm.sh)")
    command = [program, "template", "mesh", str(CHART), "--namespace", namespace, "--kube-version", KUBERNETES]
    for file in files:
        command += ["--values", str(file)]
    for text in sets:
        command += ["--set-json", text]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Failed(done.stderr.strip())
    rendered: dict[str, list[Document]] = {}
    for part in done.stdout.split("\n---\n"):
        source = next((line for line in part.splitlines() if line.startswith("# Source: ")), None)
        document = yaml.load(part, LOADER)
        if document:
            assert source is not None
            rendered.setdefault(source.rpartition("/")[2], []).append(document)
    return rendered


def documents(rendered: dict[str, list[Document]]) -> list[Document]:
    """Returns the objects of all templates in one list."""
    return [document for several in rendered.values() for document in several]


def neutral(value: Any) -> Any:
    """Returns the objects in kustomize's form: labelled as managed by kustomize, without the label of Helm's chart, and
    without the namespace in the subject of the RoleBinding.

    Kustomize sets the namespace of an overlay, in that subject too. If an overlay has no namespace, that subject has
    none either, and the API server refuses it. That is better than binding a ServiceAccount of another namespace.
    """
    if isinstance(value, list):
        return [neutral(one) for one in value]
    if not isinstance(value, dict):
        return value
    result = {key: neutral(one) for key, one in value.items() if key != "helm.sh/chart"}
    if result.get("app.kubernetes.io/managed-by") == "Helm":
        result["app.kubernetes.io/managed-by"] = "kustomize"
    if result.get("kind") == "ServiceAccount" and result.get("namespace") == NAMESPACE:
        del result["namespace"]
    return {key: one for key, one in result.items() if not (key == "annotations" and not one)}


def key(document: Document) -> tuple[str, str]:
    """Returns the kind and the name of an object, which identify it within a namespace."""
    return document["kind"], document["metadata"]["name"]


def difference(old: Any, new: Any, path: str = "") -> list[Document]:
    """Returns the JSON patch operations (RFC 6902) that turn `old` into `new`. Items of a list are compared by their
    names, if all of them have one.

    Such a list keeps the positions of its old items, and new items are appended, so that several patches of one base
    can be applied one after another.
    """
    if old == new:
        return []
    if isinstance(old, dict) and isinstance(new, dict):
        operations = [{"op": "remove", "path": _join(path, one)} for one in old if one not in new]
        for one, value in new.items():
            if one not in old:
                operations.append({"op": "add", "path": _join(path, one), "value": value})
            else:
                operations += difference(old[one], value, _join(path, one))
        return operations
    if _named(old) and _named(new):
        wanted = {one["name"]: one for one in new}
        operations = []
        for index, one in enumerate(old):
            if one["name"] in wanted:
                operations += difference(one, wanted[one["name"]], f"{path}/{index}")
        gone = [index for index, one in enumerate(old) if one["name"] not in wanted]
        operations += [{"op": "remove", "path": f"{path}/{index}"} for index in reversed(gone)]
        there = {one["name"] for one in old}
        return operations + [
            {"op": "add", "path": f"{path}/-", "value": one} for one in new if one["name"] not in there
        ]
    return [{"op": "replace", "path": path, "value": new}]


def _join(path: str, part: str) -> str:
    return f"{path}/{part.replace('~', '~0').replace('/', '~1')}"


def _named(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(one, dict) and "name" in one for one in value)


def component(base: list[Document], changed: list[Document]) -> tuple[list[Document], list[Document]]:
    """Returns the objects that a component adds, and its patches in kustomize's form."""
    before, after = {key(one): one for one in base}, {key(one): one for one in changed}
    added = [one for name, one in after.items() if name not in before]
    patches: list[Document] = []
    for name, old in before.items():
        kind = {"apiVersion": old["apiVersion"], "kind": old["kind"], "metadata": {"name": name[1]}}
        if name not in after:
            patches.append({"patch": _text({"$patch": "delete", **kind})})
        elif operations := difference(old, after[name]):
            group, _, version = old["apiVersion"].rpartition("/")
            target = {"group": group, "version": version, "kind": old["kind"], "name": name[1]}
            if _is_pool(old):
                # All pools, including those that other components or the user have added.
                del target["name"]
                target["labelSelector"] = "app.kubernetes.io/component=runtime"
            patches.append({"target": {k: v for k, v in target.items() if v}, "patch": _text(operations)})
    return added, patches


def _is_pool(document: Document) -> bool:
    labels: dict[str, str] = document["metadata"]["labels"]
    kind: str = document["kind"]
    return kind == "Deployment" and labels["app.kubernetes.io/component"] == "runtime"


class _Dumper(yaml.SafeDumper):
    """A YAML dumper with block style, literal multi-line texts, and no anchors."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Dumper.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None),
)


def _text(*values: Any) -> str:
    return str(yaml.dump_all(values, Dumper=_Dumper, sort_keys=False, width=110, allow_unicode=True))


def manifests() -> dict[str, str]:
    """Returns the content of every rendered file except the checksums, by its path below deploy/kustomize."""
    files: dict[str, str] = {}

    def write(path: str, *values: Any) -> None:
        files[path] = HEADER + _text(*values)

    def kustomization(kind: str, **parts: Any) -> Document:
        version = "kustomize.config.k8s.io/" + ("v1alpha1" if kind == "Component" else "v1beta1")
        return {"apiVersion": version, "kind": kind, **{name: part for name, part in parts.items() if part}}

    rendered = neutral(render())
    for source, several in sorted(rendered.items()):
        write(f"base/{source}", *several)
    write("base/kustomization.yaml", kustomization("Kustomization", resources=sorted(rendered)))
    base = documents(rendered)
    for name in COMPONENTS:
        added, patches = component(base, documents(neutral(render(VALUES / f"{name}.yaml"))))
        if added:
            write(f"components/{name}/added.yaml", *added)
        write(
            f"components/{name}/kustomization.yaml",
            kustomization("Component", resources=["added.yaml"] if added else [], patches=patches),
        )
        write(
            f"overlays/{name}/kustomization.yaml",
            kustomization("Kustomization", resources=["../../base"], components=[f"../../components/{name}"]),
        )
    return files


def sources() -> dict[str, bytes]:
    """Returns the content of every source of the manifests, by its path below deploy."""
    files = [Path(__file__), *VALUES.glob("*.yaml"), *(one for one in CHART.rglob("*") if one.is_file())]
    return {one.relative_to(ROOT).as_posix(): one.read_bytes() for one in files}


def made() -> dict[str, bytes]:
    """Returns the content of every existing manifest, by its path below deploy/kustomize."""
    there = (one for one in KUSTOMIZE.rglob("*") if one.is_file() and one.name != SUMS)
    return {one.relative_to(KUSTOMIZE).as_posix(): one.read_bytes() for one in there}


def sums(of: Iterable[tuple[str, bytes]]) -> str:
    """Returns one checksum of all paths and contents."""
    whole = hashlib.sha256()
    for path, content in sorted(of):
        whole.update(f"{path}\0{len(content)}\0".encode() + content)
    return whole.hexdigest()


def check() -> str | None:
    """Returns None if the manifests match the chart, or else the fault and its remedy."""
    try:
        lines = (KUSTOMIZE / SUMS).read_text().splitlines()
        known = dict(line.split(" ", 1)[::-1] for line in lines if line and not line.startswith("#"))
    except (OSError, ValueError):
        return f"deploy/kustomize/{SUMS} is missing or broken: run `make manifests` (needs helm)"
    if known.get("sources") != sums(sources().items()):
        return "the chart, deploy/values or deploy/manifests.py has changed since: run `make manifests` (needs helm)"
    if known.get("manifests") != sums(made().items()):
        return "deploy/kustomize was changed by hand: change the chart and run `make manifests` (needs helm)"
    return None


def write() -> None:
    """Replaces deploy/kustomize with manifests rendered from the current sources."""
    files = manifests()
    shutil.rmtree(KUSTOMIZE, ignore_errors=True)
    for path, text in files.items():
        (KUSTOMIZE / path).parent.mkdir(parents=True, exist_ok=True)
        (KUSTOMIZE / path).write_text(text)
    text = f"{sums(sources().items())} sources\n{sums(made().items())} manifests\n"
    (KUSTOMIZE / SUMS).write_text(HEADER + text)


def main() -> int:
    """Runs the command line: no argument, or --check."""
    if sys.argv[1:] == ["--check"]:
        why = check()
        if why:
            print(why, file=sys.stderr)
        return 1 if why else 0
    try:
        write()
    except Failed as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
