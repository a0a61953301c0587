"""The build of the image: the engine, its arguments and secrets.

buildah, podman and docker build from the same Containerfile; this module handles the few options in which they differ.
The build also gets the certificates and configuration of the machine's pip, so it works wherever `make up` works, even
behind a proxy with its own certificates.

This module needs only the standard library. The Containerfile defines the image's content.
"""

import os
import shlex
import shutil
import subprocess
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CONTAINERFILE = Path("deploy/image/Containerfile")  # relative to ROOT

ENGINES = ("docker", "podman", "buildah")
_PROBE = 20.0  # seconds for an engine to answer, as Docker's client waits for a missing daemon

_ARGUMENTS = ("BASE", "ETCD_IMAGE", "LOCK", "PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_TRUSTED_HOST")
_PROXIES = ("http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY")  # engines predefine them
_CERTIFICATES = ("PIP_CERT", "REQUESTS_CA_BUNDLE", "SSL_CERT_FILE")  # in the order in which pip looks


class NoEngineError(Exception):
    """The lack of an engine that can build an image. The text says what was tried and what to do."""


def engine(asked: str = "") -> str:
    """Returns the engine to build with: the requested one, as a command line with options, or the first one that works.
    Raises NoEngineError if there is none."""
    if asked:
        if shutil.which(shlex.split(asked)[0]) is None:
            text = f"{shlex.split(asked)[0]} is not on PATH: install it, or name another engine ({', '.join(ENGINES)})"
            raise NoEngineError(f"{text}, or leave ENGINE out to use the first one that works")
        return asked
    tried = []
    for name in ENGINES:
        if shutil.which(name) is None:
            tried.append(f"{name} is not on PATH")
            continue
        try:
            done = subprocess.run([name, "info"], capture_output=True, text=True, timeout=_PROBE)
        except subprocess.TimeoutExpired:
            tried.append(f"{name} does not answer")
            continue
        # Docker's client reports a missing daemon and still ends with 0.
        if done.returncode == 0 and "Cannot connect" not in done.stdout + done.stderr:
            return name
        lines = (done.stderr or done.stdout).strip().splitlines() or ["it printed nothing"]
        tried.append(f"{name} does not work here ({lines[-1].strip()})")
    raise NoEngineError(
        f"No engine to build an image with: {'; '.join(tried)}.\n"
        "Install one (on Debian and Ubuntu: apt install buildah), or name it: make image ENGINE=/path/to/podman"
    )


def default_tag(lock: str = "") -> str:
    """Returns the image's default name, which depends on the version and on whether models run on CPUs or GPUs.

    GPU images have their own repository rather than their own tag, because kustomize sets one tag for each repository.
    """
    return f"localhost/mesh{lock.removeprefix('image')}:{version()}"


def version() -> str:
    """Returns the project's version."""
    return str(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"])


def revision() -> str:
    """Returns the current commit, marked if the tree differs from it, or "unknown" outside a repository."""
    argv = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def arguments(environ: Mapping[str, str]) -> dict[str, str]:
    """Returns the build arguments that are set in the environment, and those for the labels."""
    given = {name: environ[name] for name in (*_ARGUMENTS, *_PROXIES) if environ.get(name)}
    return {**given, "VERSION": version(), "REVISION": revision()}


def secrets(environ: Mapping[str, str]) -> dict[str, Path]:
    """Returns the build secrets by name: certificates that pip trusts here, and the pip.conf of PIP_CONFIG_FILE."""
    found = {}
    for name in _CERTIFICATES:
        if environ.get(name):
            if Path(environ[name]).is_file():
                found["ca"] = Path(environ[name])
            break
    config = environ.get("PIP_CONFIG_FILE", "")
    if config not in ("", os.devnull) and Path(config).is_file():
        found["pip"] = Path(config)
    return found


def command(
    engine: str,
    *,
    tag: str,
    arguments: Mapping[str, str],
    secrets: Mapping[str, Path],
    options: Sequence[str] = (),
) -> list[str]:
    """Returns the command line that builds the image. It must run in ROOT."""
    argv = [*shlex.split(engine), "build"]
    if Path(shlex.split(engine)[0]).name == "buildah":
        argv.append("--layers")  # the other engines cache layers by default
    argv += ["--file", str(CONTAINERFILE), "--tag", tag, *options]
    for name, value in arguments.items():
        argv += ["--build-arg", f"{name}={value}"]
    for name, path in secrets.items():
        argv += ["--secret", f"id={name},src={path}"]
    return [*argv, "."]


def environment(environ: Mapping[str, str]) -> dict[str, str]:
    """Returns the engine's environment, with BuildKit switched on, because Docker takes secrets only with it."""
    return {**environ, "DOCKER_BUILDKIT": "1"}
