"""How the image is built: by which engine, with which arguments and secrets.

buildah, podman and docker build from the same Containerfile and hardly differ in their options; this module knows where
they do. What the machine's pip trusts and is configured with, the build is given too: behind a proxy with certificates
of its own, an image can be built wherever `make up` works.

Needs nothing but the standard library. The Containerfile says what is built.
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
_PROBE = 20.0  # seconds for an engine to say that it works; Docker's client waits for a daemon that is not there

_ARGUMENTS = ("BASE", "ETCD_IMAGE", "LOCK", "PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_TRUSTED_HOST")
_PROXIES = ("http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY")  # predefined, to engines
_CERTIFICATES = ("PIP_CERT", "REQUESTS_CA_BUNDLE", "SSL_CERT_FILE")  # in the order in which pip looks


class NoEngineError(Exception):
    """Nothing here can build an image. Says what was tried and what to do."""


def engine(asked: str = "") -> str:
    """The engine to build with: the one asked for (its command line, options and all), else the first that works."""
    if asked:
        if shutil.which(shlex.split(asked)[0]) is None:
            raise NoEngineError(f"There is no {shlex.split(asked)[0]!r} on PATH: name another with ENGINE=.")
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
        # Docker's client reports a daemon that is not there and ends with 0 all the same.
        if done.returncode == 0 and "Cannot connect" not in done.stdout + done.stderr:
            return name
        lines = (done.stderr or done.stdout).strip().splitlines() or ["it says nothing"]
        tried.append(f"{name} does not work here ({lines[-1].strip()})")
    raise NoEngineError(
        f"No engine to build an image with: {'; '.join(tried)}.\n"
        "Install one (on Debian and Ubuntu: apt install buildah), or name it: make image ENGINE=/path/to/podman"
    )


def default_tag(lock: str = "") -> str:
    """What the image is called unless somebody says otherwise: by what it runs models on, and by version.

    GPUs' is a repository of its own, not a tag: what sets one tag for one repository, as kustomize does, suits both.
    """
    return f"localhost/mesh{lock.removeprefix('image')}:{version()}"


def version() -> str:
    """The project's version."""
    return str(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"])


def revision() -> str:
    """The commit that is built, and whether the tree differs from it; "unknown" outside of a repository."""
    argv = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def arguments(environ: Mapping[str, str]) -> dict[str, str]:
    """The build arguments: those of the environment, where they are set, and what the labels say."""
    given = {name: environ[name] for name in (*_ARGUMENTS, *_PROXIES) if environ.get(name)}
    return {**given, "VERSION": version(), "REVISION": revision()}


def secrets(environ: Mapping[str, str]) -> dict[str, Path]:
    """The build secrets by name: certificates that pip trusts here, and the pip.conf that PIP_CONFIG_FILE names."""
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
    """The command line that builds the image; to be run in ROOT."""
    argv = [*shlex.split(engine), "build"]
    if Path(shlex.split(engine)[0]).name == "buildah":
        argv.append("--layers")  # the others keep layers by themselves
    argv += ["--file", str(CONTAINERFILE), "--tag", tag, *options]
    for name, value in arguments.items():
        argv += ["--build-arg", f"{name}={value}"]
    for name, path in secrets.items():
        argv += ["--secret", f"id={name},src={path}"]
    return [*argv, "."]


def environment(environ: Mapping[str, str]) -> dict[str, str]:
    """What the engine's process gets for an environment: Docker takes secrets only when it builds with BuildKit."""
    return {**environ, "DOCKER_BUILDKIT": "1"}
