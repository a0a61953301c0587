"""The number of CPUs that a cgroup's quota allows: for both versions of cgroups, for nested groups, without a limit,
and for invalid content."""

import os

import pytest

from mesh.host import cpus


def group(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


def quota(tmp_path, membership):
    (tmp_path / "self").write_text(membership)
    return cpus.quota(root=tmp_path / "cg", membership=tmp_path / "self")


def test_version_2(tmp_path):
    group(tmp_path / "cg/kube/pod", cpu__max="150000 100000\n")
    assert quota(tmp_path, "0::/kube/pod\n") == 1.5


def test_the_tightest_group_above_counts(tmp_path):
    group(tmp_path / "cg/kube/pod", cpu__max="max 100000\n")
    group(tmp_path / "cg/kube", cpu__max="400000 100000\n")
    assert quota(tmp_path, "0::/kube/pod\n") == 4.0


def test_version_1(tmp_path):
    group(tmp_path / "cg/cpu/docker/x", cpu__cfs_quota_us="250000", cpu__cfs_period_us="100000")
    assert quota(tmp_path, "12:memory:/a\n4:cpuacct,cpu:/docker/x\n") == 2.5


def test_in_a_container_the_own_group_is_at_the_top(tmp_path):
    group(tmp_path / "cg", cpu__max="50000 100000\n")
    assert quota(tmp_path, "0::/some/path/of/the/host\n") == 0.5


@pytest.mark.parametrize("text", ["max 100000", "-1 100000", "0 0", "x y", "", "100000 0"])
def test_no_limit_and_nonsense(tmp_path, text):
    group(tmp_path / "cg", cpu__max=text)
    assert quota(tmp_path, "0::/\nnonsense\n") is None


def test_no_cgroups_at_all(tmp_path):
    assert cpus.quota(root=tmp_path, membership=tmp_path / "none") is None


def test_parts_of_a_cpu_are_rounded_up_and_never_more_than_may_be_used(tmp_path):
    (tmp_path / "self").write_text("0::/\n")
    for text, expected in (("10000 100000", 1), ("110000 100000", 2), ("99900000 100000", 10**6)):
        group(tmp_path / "cg", cpu__max=text)
        found = cpus.available(root=tmp_path / "cg", membership=tmp_path / "self")
        assert found == min(expected, len(os.sched_getaffinity(0)))
