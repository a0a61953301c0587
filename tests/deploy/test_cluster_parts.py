"""The test cluster's code that needs no cluster: among other things, which processes and rules are the cluster's
own."""

import io
import ipaddress
import json
import sys
from pathlib import Path

import pytest

from deploy.cluster import configs, identity, layout, lifecycle, needs, network, parts, programs
from deploy.cluster.progress import SILENCE, Steps
from tests.support.waiting import until


def test_others_rules_stay() -> None:
    """Only the cluster's chains, rules and jumps are removed from the output of iptables-save."""
    others = [
        "*nat",
        ":PREROUTING ACCEPT [0:0]",
        ":DOCKER - [0:0]",
        "-A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER",
        "-A POSTROUTING -s 172.17.0.0/16 ! -o docker0 -j MASQUERADE",
        "COMMIT",
    ]
    ours = [
        ":KUBE-SERVICES - [0:0]",
        ":CNI-HOSTPORT-DNAT - [0:0]",
        f":{network.CHAIN} - [0:0]",
        '-A PREROUTING -m comment --comment "kubernetes service portals" -j KUBE-SERVICES',
        "-A KUBE-SEP-ABC -s 10.244.0.2/32 -j KUBE-MARK-MASQ",
        "-A OUTPUT -m addrtype --dst-type LOCAL -j CNI-HOSTPORT-DNAT",
        f"-A FORWARD -j {network.CHAIN}",
        f"-A {network.CHAIN} -i {layout.POD_BRIDGE} ! -o {layout.POD_BRIDGE} -j REJECT",
    ]
    saved = "".join(f"{line}\n" for line in [*others[:3], *ours, *others[3:]])
    assert network.without_ours(saved) == "".join(f"{line}\n" for line in others)


@pytest.mark.parametrize(
    ("argv", "is_ours"),
    [
        pytest.param(["/c/bin/kube", "kubelet", "--config=x"], True, id="a part"),
        pytest.param(["/c/bin/etcd", "--data-dir=x"], True, id="its etcd"),
        pytest.param(["/c/bin/kube", "kubectl", "get"], False, id="somebody's kubectl"),
        pytest.param(["/c/bin/kubectl", "port-forward"], False, id="kubectl by its name"),
        pytest.param(["/other/bin/kube", "kubelet"], False, id="another folder's part"),
        pytest.param(["etcd", "--data-dir=x"], False, id="another etcd"),
        pytest.param(["containerd", "--config", str(layout.CONTAINERD / "config.toml")], True, id="its containerd"),
        pytest.param(
            ["/usr/bin/containerd-shim-runc-v2", "-address", str(layout.CONTAINERD_SOCKET)], True, id="its shim"
        ),
        pytest.param(["/usr/bin/containerd"], False, id="the machine's containerd"),
        pytest.param(["vi", str(layout.CONTAINERD / "config.toml")], False, id="an editor"),
        pytest.param([], False, id="a kernel thread"),
    ],
)
def test_which_processes_are_the_clusters(argv: list[str], is_ours: bool) -> None:
    """`is_part` is true only for processes that run as part of this cluster, which are those that `make cluster-down`
    ends."""
    assert parts.is_part(argv, Path("/c/bin")) is is_ours


def test_what_is_to_be_built_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Programs that are missing, or were built from other sources, are listed as still to be built."""
    monkeypatch.setattr(layout, "BIN", tmp_path)
    monkeypatch.setattr(needs, "obstacles", list)
    monkeypatch.setattr(needs, "missing_packages", list)
    assert lifecycle.unbuilt().startswith("not built yet: pause, etcd, ")
    for program in programs.ALL:
        program.path.touch()
        program.stamp.write_text(program.sum())
    assert lifecycle.unbuilt() == ""
    programs.ALL[0].stamp.write_text("of other sources")
    assert "pause" in lifecycle.unbuilt()
    monkeypatch.setattr(needs, "obstacles", lambda: ["root is needed"])
    assert lifecycle.unbuilt() == "root is needed"


def test_addresses_fit_together() -> None:
    """Address ranges are private and disjoint, and fixed addresses lie in their ranges."""
    pods, services = ipaddress.ip_network(layout.POD_RANGE), ipaddress.ip_network(layout.SERVICE_RANGE)
    node = ipaddress.ip_address(layout.NODE_IP)
    assert pods.is_private
    assert services.is_private
    assert node.is_private
    assert not pods.overlaps(services)
    assert node not in pods
    assert node not in services
    assert ipaddress.ip_address(layout.API_IP) == services[1]
    assert ipaddress.ip_address(layout.DNS_IP) in services


def test_documents_are_json() -> None:
    """The settings of kubelet, proxy, pod network and DNS can be written as JSON, and none names the machine's
    /var/lib."""
    for document in (configs.kubelet_file(), configs.proxy_file(), configs.pod_network(), configs.dns_objects()):
        assert "/var/lib" not in json.dumps(document)


def test_a_kubeconfig_carries_what_it_needs() -> None:
    """A kubeconfig contains no paths, so it can be passed around."""
    config = identity.kubeconfig(b"PEM", user={"token": "t"}, namespace="mine")
    assert config["clusters"][0]["cluster"]["certificate-authority-data"] == "UEVN"
    assert config["contexts"][0]["context"]["namespace"] == "mine"
    assert "/" not in json.dumps(config).replace("https://", "")


@pytest.mark.parametrize(
    ("text", "version"),
    [("go version go1.26.8 linux/amd64", (1, 26)), ("go version go1.27rc1 linux/amd64", (1, 27)), ("no", None)],
)
def test_go_versions_are_read(text: str, version: tuple[int, int] | None) -> None:
    """The versions of Go's releases and candidates are parsed. Anything else is not a version."""
    assert needs.parse_go_version(text) == version


@pytest.mark.parametrize(
    ("script", "said"),
    [
        pytest.param(None, "Go is not on PATH", id="missing"),
        pytest.param("echo broken toolchain >&2; exit 2", "ended with 2 and said: broken toolchain", id="broken"),
        pytest.param("echo go version go1.2 linux/amd64", "Go 1.2 is too old", id="old"),
        pytest.param("echo go version go9.9 linux/amd64", None, id="new"),
    ],
)
def test_what_is_wrong_with_go_is_said(
    script: str | None, said: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if script is not None:
        (tmp_path / "go").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "go").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    about_go = [line for line in needs.obstacles() if "Go" in line]
    assert [said in line for line in about_go] == ([True] if said else [])


def test_a_program_is_built_again_when_its_sources_change(tmp_path: Path) -> None:
    """A program is rebuilt if its command or the content of a source has changed. A folder among the sources does not
    count."""
    file = tmp_path / "main.go"
    file.write_text("one")
    first = programs.checksum(["go", "build"], [file])
    assert programs.checksum(["go", "build"], [file, tmp_path]) == first
    assert programs.checksum(["go", "build", "-x"], [file]) != first
    file.write_text("two")
    assert programs.checksum(["go", "build"], [file]) != first


def test_each_program_has_a_source() -> None:
    """Each program is a foreign package, or its module has a go.mod."""
    for program in programs.ALL:
        assert program.module is None or (program.module / "go.mod").exists(), program.name


# --- progress ---


async def test_steps_say_which_of_how_many_and_are_never_silent() -> None:
    """A build step prints its number, the time since the start and its progress, and repeats them while it runs."""
    assert SILENCE <= 10.0
    now, stream = [0.0], io.StringIO()
    steps = Steps(12, stream=stream, clock=lambda: now[0], silence=0.01)
    with steps.step("building etcd"):
        now[0] = 65.0
        await until(lambda: stream.getvalue().count("building etcd") > 2, why=stream.getvalue)
    with steps.step("building kube") as tell:
        now[0] = 3700.0
        tell("812 packages compiled")
        await until(lambda: "812" in stream.getvalue(), why=stream.getvalue)
    lines = stream.getvalue().splitlines()
    assert lines[0] == "[ 1/12] 00:00  building etcd"
    assert "[ 1/12] 01:05  building etcd, 01:05" in lines
    assert lines[-1] == "[ 2/12] 61:40  building kube: 812 packages compiled, 60:35"


def test_what_go_does_is_counted_and_its_errors_are_shown(tmp_path: Path) -> None:
    """Go prints a line for each package, from which build progress is counted. Go's errors are shown."""
    told: list[str] = []
    script = "import sys; [print(line, file=sys.stderr) for line in {lines}]; sys.exit({status})"
    lines = ["go: downloading example.com/a v1.0.0", "example.com/a", "example.com/b"]
    programs._go([sys.executable, "-c", script.format(lines=lines, status=0)], tmp_path, told.append)
    assert told == ["1 modules downloaded", "1 packages compiled", "2 packages compiled"]
    lines = ["main.go:3:1: syntax error: unexpected }"]
    with pytest.raises(RuntimeError, match=r"main.go:3:1: syntax error"):
        programs._go([sys.executable, "-c", script.format(lines=lines, status=1)], tmp_path, told.append)


def test_the_first_build_says_what_it_takes(monkeypatch: pytest.MonkeyPatch, capsys, tmp_path: Path) -> None:
    """The first build says how much time and disk space it needs before anything is built, and counts all steps."""
    monkeypatch.setattr(layout, "BIN", tmp_path)
    monkeypatch.setattr(needs, "missing_packages", list)
    monkeypatch.setattr(needs, "obtain", lambda: None)
    monkeypatch.setattr(programs, "_go", lambda *_: None)
    monkeypatch.setattr(lifecycle.images, "prepare", lambda tell: tell("none"))
    monkeypatch.setattr(lifecycle.images, "tidy", lambda: None)
    lifecycle.build()
    first, *lines = capsys.readouterr().err.splitlines()
    assert "2.5 GB" in first
    assert "15 minutes" in first
    assert [line.split("]")[0] for line in lines] == [f"[{number}/8" for number in range(1, 9)]
