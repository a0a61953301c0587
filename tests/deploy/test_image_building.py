"""Building of the image: the engine, its command line, and what a build gets from the environment."""

import os
import re
from pathlib import Path

import pytest

from deploy.cluster import images, layout
from deploy.image import building


def _program(folder: Path, name: str, script: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


def test_the_first_engine_that_works_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A docker client without a daemon does not count as working, although it exits with 0."""
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    _program(tmp_path / "bin", "docker", 'echo "Cannot connect to the Docker daemon"')
    _program(tmp_path / "bin", "buildah", "exit 0")
    assert building.engine() == "buildah"


def test_without_an_engine_it_says_what_was_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If no engine works, the error lists each one with the reason, and says what to install."""
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    _program(tmp_path / "bin", "podman", 'echo "no user namespaces" >&2; exit 125')
    with pytest.raises(building.NoEngineError) as error:
        building.engine()
    for said in ("docker is not on PATH", "podman does not work here (no user namespaces)", "apt install buildah"):
        assert said in str(error.value)


def test_an_engine_asked_for_is_taken_with_its_options() -> None:
    """ENGINE may be a command line with options. An engine that does not exist is refused."""
    assert building.engine("sh --root /x") == "sh --root /x"
    with pytest.raises(building.NoEngineError, match="nowhere-to-be-found"):
        building.engine("nowhere-to-be-found build")


def test_the_command_line() -> None:
    """The command line passes arguments and secrets on. Only buildah needs an option to keep layers."""
    argv = building.command(
        "/usr/bin/buildah --root /x", tag="mesh:1", arguments={"BASE": "b"}, secrets={"ca": Path("/ca.pem")}
    )
    assert argv[:5] == ["/usr/bin/buildah", "--root", "/x", "build", "--layers"]
    assert argv[-5:] == ["--build-arg", "BASE=b", "--secret", "id=ca,src=/ca.pem", "."]
    assert "--layers" not in building.command("docker", tag="mesh:1", arguments={}, secrets={})


def test_what_a_build_is_given_of_the_environment(tmp_path: Path) -> None:
    """A build gets the build arguments that are set, the certificates that pip trusts and pip's configuration. It gets
    nothing else from the environment."""
    (tmp_path / "ca.pem").touch()
    (tmp_path / "pip.conf").touch()
    environ = {
        "BASE": "python:3.12-slim",
        "LOCK": "",
        "HTTPS_PROXY": "http://127.0.0.1:1",
        "PASSWORD": "secret",
        "PIP_CERT": str(tmp_path / "ca.pem"),
        "SSL_CERT_FILE": "/elsewhere",
        "PIP_CONFIG_FILE": str(tmp_path / "pip.conf"),
    }
    arguments = building.arguments(environ)
    assert set(arguments) == {"BASE", "HTTPS_PROXY", "VERSION", "REVISION"}
    assert building.secrets(environ) == {"ca": tmp_path / "ca.pem", "pip": tmp_path / "pip.conf"}
    assert building.secrets({"PIP_CERT": "/nowhere", "PIP_CONFIG_FILE": os.devnull}) == {}


def test_the_default_tag_tells_what_it_runs_on() -> None:
    """The default tag depends on the kind of image, so a GPU image does not replace a CPU image."""
    assert building.default_tag() == building.default_tag("image") == f"localhost/mesh:{building.version()}"
    assert building.default_tag("image-gpu") == f"localhost/mesh-gpu:{building.version()}"


def test_the_context_holds_what_is_copied() -> None:
    """Everything that the Containerfile copies from the tree exists, is not ignored, and is one of the files that
    determine the tag of the cluster's image."""
    allowed = {line[1:] for line in (building.ROOT / ".containerignore").read_text().splitlines() if line[:1] == "!"}
    copied = set()
    for line in (building.ROOT / building.CONTAINERFILE).read_text().splitlines():
        if line.startswith("COPY ") and "--from=" not in line:
            copied |= {word.split("/")[0] for word in line.split()[1:-1]}
    assert copied == allowed
    assert all((building.ROOT / name).exists() for name in copied)
    assert copied <= {*images.INGREDIENTS, "requirements"}


def test_the_image_leaves_the_demo_out() -> None:
    """No cluster runs the demo's sample models and traffic."""
    assert "mesh/demo" in (building.ROOT / ".containerignore").read_text().splitlines()
    assert (building.ROOT / "mesh" / "demo").is_dir()


def test_the_image_brings_the_etcd_that_the_cluster_builds() -> None:
    """The Containerfile and the cluster name the same images of etcd and Python. The Go modules have the versions of
    etcd and Kubernetes that the cluster names."""
    text = (building.ROOT / building.CONTAINERFILE).read_text()
    default = re.search(r"^ARG ETCD_IMAGE=(\S+)$", text, re.MULTILINE)
    assert default is not None
    assert default[1] == layout.ETCD_IMAGE
    base = re.search(r"^ARG BASE=(\S+)$", text, re.MULTILINE)
    assert base is not None
    assert base[1] == layout.BASE_IMAGE
    module = (layout.SOURCES / "programs/etcd/go.mod").read_text()
    assert f"go.etcd.io/etcd/server/v3 {layout.ETCD_VERSION}\n" in module
    module = (layout.SOURCES / "programs/kube/go.mod").read_text()
    assert f"k8s.io/kubernetes {layout.KUBERNETES}\n" in module


def test_docker_finds_the_same_list() -> None:
    """Docker finds the same ignore list next to the Containerfile that other engines find at the top of the tree."""
    beside = building.ROOT / f"{building.CONTAINERFILE}.dockerignore"
    assert beside.resolve() == building.ROOT / ".containerignore"
