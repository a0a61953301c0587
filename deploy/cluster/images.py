"""Container images without a registry: the bases of the Containerfile, those of the cluster's pods, and Mesh's own.

The images are kept in a buildah storage of the cluster's own, in `.cache/cluster`, because some have the names of other
projects' images. A Debian from `debootstrap` replaces the Python image that the Containerfile names, and the etcd built
here replaces the official one. The Containerfile can thus be tested with its defaults, and other builds on this machine
never see these replacements. Finished images are passed to containerd as an archive.
"""

import os
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

from deploy.cluster import layout, node, programs
from deploy.image import building

MESH = "localhost/mesh"
_BUILDING = 1800.0
_RELEASE = "bookworm"  # its Python is 3.11
_NEEDED = "python3,python3-venv,ca-certificates"
# Not needed in containers, and more than half of debootstrap's output.
_SUPERFLUOUS = ("var/cache/apt", "var/lib/apt/lists", "usr/share/doc", "usr/share/man", "usr/share/locale")
# The sources of the image, as .containerignore lists them.
INGREDIENTS = ("LICENSE", "README.md", "pyproject.toml", ".containerignore", "mesh", "placement", "puller", "router")


def environment() -> dict[str, str]:
    """Returns buildah's environment. Builds are isolated by chroot, because containers often allow nothing else."""
    return building.environment(
        {
            **os.environ,
            "STORAGE_DRIVER": "overlay",
            "BUILDAH_ISOLATION": "chroot",
        }
    )


def engine() -> str:
    """Returns the command line of buildah with the cluster's storage."""
    return f"buildah --root {layout.STORAGE} --runroot {layout.BUILDING}"


def prepare(tell: Callable[[str], None]) -> None:
    """Makes all images except Mesh's own, unless they exist and are up to date, and reports progress."""
    tell("programs")
    _from_programs(layout.PAUSE_IMAGE, {"pause": "/pause"}, entrypoint="/pause")
    _from_programs(layout.DNS_IMAGE, {"coredns": "/coredns"}, entrypoint="/coredns")
    _from_programs(layout.ETCD_IMAGE, {name: f"/usr/local/bin/{name}" for name in ("etcd", "etcdctl", "etcdutl")})
    if not _exists(layout.BASE_IMAGE):
        tell(f"{layout.BASE_IMAGE} of Debian packages, a minute or more")
        folder = layout.CACHE / "base"
        shutil.rmtree(folder, ignore_errors=True)
        _run(["debootstrap", "--variant=minbase", f"--include={_NEEDED}", _RELEASE, str(folder)])
        for name in _SUPERFLUOUS:
            shutil.rmtree(folder / name, ignore_errors=True)
        _from_scratch(layout.BASE_IMAGE, {folder: "/"}, ["--cmd", "python3"])
        shutil.rmtree(folder)


def tidy() -> None:
    """Removes containers and mounts left by builds, mostly killed ones. Must not be called while a build runs."""
    if layout.STORAGE.exists():
        _run([*engine().split(), "rm", "--all"])
        node.unmount(layout.STORAGE, layout.BUILDING)
        shutil.rmtree(layout.BUILDING, ignore_errors=True)


def tag() -> str:
    """Returns the name of Mesh's image for the current tree. It contains a checksum of the image's sources."""
    files = []
    for name in INGREDIENTS:
        path = layout.ROOT / name
        files += sorted(path.rglob("*.py")) if path.is_dir() else [path]
    files += [*sorted((layout.ROOT / "requirements").glob("image*.txt")), layout.ROOT / building.CONTAINERFILE]
    return f"{MESH}:{programs.checksum([layout.ETCD_VERSION], files)}"


def build() -> str:
    """Builds Mesh's image from the tree unless it exists, and returns its name. Images of earlier trees are removed.
    Raises RuntimeError with buildah's output if the build fails."""
    name = tag()
    if _exists(name):
        return name
    argv = building.command(
        engine(),
        tag=name,
        arguments=building.arguments(os.environ),
        secrets=building.secrets(os.environ),
        options=["--pull-never"],
    )
    _run(argv, cwd=layout.ROOT)
    for other in _names(MESH):  # images of earlier trees, whose layers make up most of the next one
        if other != name:
            _run([*engine().split(), "rmi", other])
    return name


def changed(name: str, repository: str, change: Callable[[Path], None]) -> str:
    """Makes an image in another repository from one of Mesh's, in which `change` changes files, and returns its name.
    The name is new each time, because a cluster that has an image of that name would not import the changed one."""
    container = _run([*engine().split(), "from", "--pull-never", name]).strip()
    try:
        change(Path(_run([*engine().split(), "mount", container]).strip()))
        _run([*engine().split(), "umount", container])
        for other in _names(repository):
            _run([*engine().split(), "rmi", other])
        image_id = _run([*engine().split(), "commit", "--quiet", container]).strip()
        made = f"{repository}:{name.rpartition(':')[2]}-{image_id.removeprefix('sha256:')[:12]}"
        _run([*engine().split(), "tag", image_id, made])
    finally:
        _run([*engine().split(), "rm", container])
    return made


def load(name: str) -> None:
    """Imports an image into the running cluster, unless the cluster has it. Other versions of Mesh's image are
    removed."""
    there = node.images()
    if name not in there:
        archive = layout.CACHE / "image.tar"
        archive.unlink(missing_ok=True)  # buildah refuses to add to an existing archive
        try:
            _run([*engine().split(), "push", "--quiet", name, f"docker-archive:{archive}:{name}"])
            node.ctr("images", "import", str(archive))
        finally:
            archive.unlink(missing_ok=True)
    repository = name.rpartition(":")[0]
    if repository.startswith(MESH):
        for other in there:
            if other.rpartition(":")[0] == repository and other != name:
                node.ctr("images", "remove", other)


def _from_programs(name: str, files: dict[str, str], entrypoint: str = "") -> None:
    """Makes an image of some programs, unless it was made from their current sources."""
    total = programs.checksum([program.sum() for program in programs.ALL if program.name in files], [])
    stamp = layout.STORAGE.with_name(f".image-{name.replace('/', '-')}")
    if _exists(name) and stamp.exists() and stamp.read_text() == total:
        return
    config = ["--entrypoint", f'["{entrypoint}"]'] if entrypoint else []
    _from_scratch(name, {layout.BIN / program: target for program, target in files.items()}, config)
    stamp.write_text(total)


def _from_scratch(name: str, files: dict[Path, str], config: Sequence[str]) -> None:
    container = _run([*engine().split(), "from", "scratch"]).strip()
    try:
        for source, target in files.items():
            _run([*engine().split(), "copy", "--quiet", container, str(source), target])
        if config:
            _run([*engine().split(), "config", *config, container])
        _run([*engine().split(), "commit", "--quiet", container, name])
    finally:
        _run([*engine().split(), "rm", container])


def _exists(name: str) -> bool:
    argv = [*engine().split(), "inspect", "--type", "image", "--format", "{{.FromImageID}}", name]
    return subprocess.run(argv, env=environment(), capture_output=True, timeout=60.0).returncode == 0


def _names(repository: str) -> list[str]:
    listed = _run([*engine().split(), "images", "--format", "{{.Name}}:{{.Tag}}"])
    return [line for line in listed.split() if line.startswith(f"{repository}:")]


def _run(argv: Sequence[str], cwd: Path | None = None) -> str:
    done = subprocess.run(argv, cwd=cwd, env=environment(), capture_output=True, text=True, timeout=_BUILDING)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(argv)}:\n{(done.stderr or done.stdout)[-4000:]}")
    return done.stdout
