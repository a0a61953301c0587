"""Start and stop of the cluster, from any state that an earlier run has left.

A start first stops everything, so it does not matter how the last cluster ended. A stop kills the control plane instead
of shutting it down: its store is discarded anyway, and an API server that shuts down keeps its port for up to a minute.
Parts that wait for each other by themselves are started together.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from deploy.cluster import configs, identity, images, layout, needs, network, node, parts, programs
from deploy.cluster.progress import Steps

_ANSWERING = 60.0  # seconds for the API; 3 to 6 on two cores
_READY = 90.0  # for the node and the names; 5 to 8


class OccupiedError(Exception):
    """A running cluster on this machine that belongs to another tree. The text says which."""


_FIRST = (
    "The first time takes about 15 minutes on two idle cores, longer on busy ones, and 2.5 GB of disk, in "
    f"{layout.CACHE} and in Go's own cache. After that it takes a minute."
)


def build(more: int = 0) -> Steps:
    """Builds whatever a start needs and does not find. Returns the `Steps`, whose total includes `more` steps of the
    caller. Raises needs.MissingError for a requirement that it cannot meet, and RuntimeError if a build fails."""
    unbuilt, missing = programs.unbuilt(), needs.missing_packages()
    steps = Steps(bool(missing) + len(unbuilt) + 1 + more)
    if unbuilt:
        print(_FIRST, file=sys.stderr, flush=True)
    with steps.step(f"installing Debian packages: {' '.join(missing)}") if missing else contextlib.nullcontext():
        needs.obtain()
    programs.build(steps)
    with steps.step("images for the cluster's own pods, and those that Mesh's is made from") as tell:
        images.tidy()  # after a build that was killed
        try:
            images.prepare(tell)
        finally:
            images.tidy()
    return steps


def unbuilt() -> str:
    """Returns what must be built or obtained before the cluster can start, and how. An empty text means that nothing is
    missing."""
    if found := needs.obstacles():
        return "; ".join(found)
    missing = [program.name for program in programs.unbuilt()] or needs.missing_packages()
    return f"not built yet: {', '.join(missing)}; run make cluster" if missing else ""


def image() -> str:
    """Builds the image of this tree, imports it into the cluster if that runs, and returns its name."""
    try:
        name = images.build()
        if is_up():
            images.load(name)
    finally:
        images.tidy()
    return name


def image_changed(name: str, repository: str, change: Callable[[Path], None]) -> str:
    """Makes a changed image from this tree's (see `images.changed`), imports it into the running cluster, and returns
    its name."""
    try:
        made = images.changed(name, repository, change)
        images.load(made)
    finally:
        images.tidy()
    return made


def is_up() -> bool:
    """Returns whether this tree's cluster runs and answers."""
    return _owner() == layout.CACHE and _answers("/readyz") and _answers(f"/api/v1/nodes/{layout.NODE}")


def up(tell: Callable[[str], None] = lambda _: None) -> None:
    """Starts or restarts the cluster, and reports what it is waiting for. `build` must have run. Raises StartError if a
    part does not start, and OccupiedError if another tree's cluster runs."""
    tell("stopping the previous cluster")
    down()
    for folder in (layout.RUN, layout.CONTAINERD, layout.NET, layout.KUBELET):
        folder.mkdir(mode=0o755, parents=True, exist_ok=True)
    layout.OWNER.write_text(str(layout.CACHE))
    started: dict[str, subprocess.Popen[bytes]] = {}

    def start(name: str, argv: list[str]) -> None:
        started[name] = parts.start(name, argv)

    def until(condition: Callable[[], object], what: str, timeout: float) -> None:
        tell(f"waiting until {what}")
        parts.until(condition, what, timeout=timeout, started=started)

    try:
        plugins = needs.plugins()
        assert plugins is not None, "the network plugins are missing: call build() first"
        network.make()
        identity.make()
        (layout.CONTAINERD / "config.toml").write_text(configs.containerd_file(plugins))
        (layout.NET / "10-mesh-pods.conflist").write_text(json.dumps(configs.pod_network()))
        (layout.RUN / "kubelet.json").write_text(json.dumps(configs.kubelet_file()))
        (layout.RUN / "proxy.json").write_text(json.dumps(configs.proxy_file()))

        start("etcd", configs.etcd())
        start("apiserver", configs.apiserver())  # waits for etcd by itself
        start("containerd", configs.containerd())
        until(_containerd_answers, "containerd answers", _ANSWERING)
        for name in (layout.PAUSE_IMAGE, layout.DNS_IMAGE):
            images.load(name)
        until(lambda: _answers("/readyz"), "the API answers", _ANSWERING)
        start("controller-manager", configs.manager())
        start("scheduler", configs.scheduler())
        start("kubelet", configs.kubelet())
        start("proxy", configs.proxy())
        objects = json.dumps({"apiVersion": "v1", "kind": "List", "items": configs.dns_objects()})
        kubectl("apply", "--filename=-", given=objects)
        until(_node_is_ready, "the node is ready", _READY)
        until(_names_are_served, "names are served", _READY)
    except BaseException:
        with contextlib.suppress(Exception):
            down()
        raise


def down() -> None:
    """Stops this tree's cluster if it runs, and restores the machine's network and kernel settings. Logs and built
    files stay. Raises OccupiedError if another tree's cluster runs."""
    owner = _owner()
    if owner is not None and owner != layout.CACHE and owner.exists():
        raise OccupiedError(
            f"A cluster that was started from {owner.parent.parent} runs on this machine.\n"
            f"Stop it first: make -C {owner.parent.parent} cluster-down"
        )
    processes = parts.running((owner or layout.CACHE) / "bin")
    if owner is None and not processes:
        return
    runtime = [pid for pid, argv in processes.items() if Path(argv[0]).name.startswith("containerd")]
    # The kubelet first, as it would create the pods again.
    parts.end([pid for pid in processes if pid not in runtime], signal.SIGKILL)
    node.kill_pods()
    try:
        node.forget_pods()
    except (RuntimeError, subprocess.TimeoutExpired):  # containerd has ended, so its state is removed
        shutil.rmtree(layout.CONTAINERS, ignore_errors=True)
    parts.end([*parts.running((owner or layout.CACHE) / "bin")])
    network.remove()
    node.clean()


def kubectl(*argv: str, given: str | None = None, timeout: float = 60.0) -> str:
    """Runs kubectl as the cluster's admin, and returns its output. Raises RuntimeError with kubectl's error if it
    fails."""
    command = [str(layout.BIN / "kubectl"), f"--kubeconfig={layout.KUBECONFIG}", *argv]
    environment = {**os.environ, "HOME": str(layout.HOME)}
    done = subprocess.run(command, input=given, env=environment, capture_output=True, text=True, timeout=timeout)
    if done.returncode != 0:
        raise RuntimeError(f"kubectl {' '.join(argv)}: {done.stderr.strip()}")
    return done.stdout


def _owner() -> Path | None:
    try:
        return Path(layout.OWNER.read_text())
    except OSError:
        return None


def _answers(path: str) -> bool:
    try:
        kubectl("get", "--request-timeout=2s", f"--raw={path}", timeout=10.0)
    except (RuntimeError, OSError, subprocess.TimeoutExpired):
        return False
    return True


def _containerd_answers() -> bool:
    try:
        node.ctr("version", timeout=10.0)
    except (RuntimeError, subprocess.TimeoutExpired):
        return False
    return True


def _node_is_ready() -> bool:
    nodes = json.loads(kubectl("get", "nodes", "--output=json"))["items"]
    return any(
        condition["type"] == "Ready" and condition["status"] == "True"
        for one in nodes
        for condition in one["status"].get("conditions", ())
    )


def _names_are_served() -> bool:
    state = json.loads(kubectl("--namespace=kube-system", "get", "deployment/coredns", "--output=json"))["status"]
    return bool(state.get("availableReplicas", 0) > 0)


def describe() -> str:
    """Returns a text that says how to use the running cluster."""
    return (
        f"The cluster is up.\n"
        f"  export KUBECONFIG={layout.KUBECONFIG}\n"
        f"  export PATH={layout.BIN}:$PATH    # kubectl, helm, etcdctl\n"
        f"make cluster-down stops it."
    )


def main(argv: list[str]) -> int:
    """Runs `python -m deploy.cluster build|built|up|down|image`. Returns 0, 1 after an error, 2 for wrong usage, or 3
    if `built` finds that something is not built."""
    try:
        match argv:
            case ["build"]:
                build()
            case ["built"]:
                if why := unbuilt():
                    print(why)
                    return 3
            case ["up"]:
                with build(more=1).step("starting the cluster") as tell:
                    up(tell)
                print(describe())
            case ["down"]:
                down()
            case ["image"]:
                with build(more=1).step("building Mesh's image, some minutes the first time"):
                    name = image()
                print(name)
            case _:
                print("usage: python -m deploy.cluster build|built|up|down|image", file=sys.stderr)
                return 2
    except (needs.MissingError, OccupiedError, parts.StartError, RuntimeError, subprocess.SubprocessError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0
