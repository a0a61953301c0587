"""The etcd of a mesh on one machine: how it is found, how its version is read, and its start with compaction and a
quota."""

from pathlib import Path

import pytest

from mesh.etcdserver import single
from mesh.etcdserver.single import etcd_argv, version_warning


@pytest.mark.parametrize(
    ("version", "warned"), [("3.5.0", True), ("3.5.2", True), ("3.5.3", False), ("3.5.21", False), ("3.6.1", False)]
)
def test_versions_with_the_corruption_bug_are_known(version: str, warned: bool) -> None:
    assert (version in version_warning(version)) is warned


def test_the_local_etcd_compacts_itself_and_has_a_quota(tmp_path: Path) -> None:
    argv = etcd_argv("/bin/etcd", tmp_path, 1, 2)
    assert argv[0] == "/bin/etcd"
    options = dict(arg.lstrip("-").split("=", 1) for arg in argv[1:])
    assert options["auto-compaction-mode"] == "periodic"
    assert options["auto-compaction-retention"] not in ("", "0")
    assert 0 < int(options["quota-backend-bytes"]) <= 8 * 2**30
    assert all("127.0.0.1" in url for name, url in options.items() if "urls" in name)


def test_an_etcd_is_found_and_names_its_version() -> None:
    assert single.version(single.find()).startswith("3.")


def test_an_etcd_that_is_missing_or_does_not_run_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "etcd").write_text("#!/bin/sh\nexit 3\n")
    (tmp_path / "etcd").chmod(0o755)
    with pytest.raises(single.NoEtcd, match=r"`.* --version` failed \("):
        single.version(str(tmp_path / "etcd"))

    def missing(name: str) -> str:
        raise FileNotFoundError(f"no program {name}: put it on PATH")

    monkeypatch.setattr(single, "find_binary", missing)
    with pytest.raises(single.NoEtcd, match="put it on PATH"):
        single.find()
