"""The machines on which a server that Mesh installs can run, and what the error says about others."""

import ctypes.util
import os
import platform
import sys
import sysconfig
from collections import namedtuple
from pathlib import Path

import pytest

from mesh.modelservers import availability, environments, kinds, machines

Version = namedtuple("Version", "major minor micro releaselevel serial")


class Machine:
    """The machine that the checks see."""

    def __init__(self, patch: pytest.MonkeyPatch, libraries: Path) -> None:
        self._patch = patch
        self._libraries = libraries
        self.runs("linux", "x86_64", "glibc", "2.36")
        self.python(11)
        self.library(beside=True)

    def runs(self, system: str, machine: str, library: str, version: str) -> None:
        """Sets the system, the processor and the C library."""
        self._patch.setattr(sys, "platform", system)
        self._patch.setattr(platform, "machine", lambda: machine)
        self._patch.setattr(platform, "libc_ver", lambda: (library, version))

    def python(self, minor: int) -> None:
        self._patch.setattr(sys, "version_info", Version(3, minor, 1, "final", 0))

    def library(self, *, beside: bool = False, known: bool = False) -> None:
        """Puts Python's shared library beside Python, or where the system's linker finds it, or nowhere."""
        name = f"libpython3.{sys.version_info.minor}.so.1.0"
        (self._libraries / name).unlink(missing_ok=True)
        if beside:
            (self._libraries / name).touch()
        values = {"LIBDIR": str(self._libraries), "INSTSONAME": name}
        self._patch.setattr(sysconfig, "get_config_var", values.get)
        self._patch.setattr(ctypes.util, "find_library", lambda found: f"lib{found}.so.1.0" if known else None)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Machine:
    """A machine on which Triton can run."""
    return Machine(monkeypatch, tmp_path)


@pytest.mark.parametrize(
    ("system", "processor", "library", "version", "here"),
    [
        ("linux", "aarch64", "glibc", "2.36", "this is linux on aarch64 with glibc 2.36"),
        ("linux", "x86_64", "glibc", "2.31", "this is linux on x86_64 with glibc 2.31"),
        ("linux", "x86_64", "glibc", "2.4", "this is linux on x86_64 with glibc 2.4"),
        ("linux", "x86_64", "", "", "this is linux on x86_64:"),  # musl, as in Alpine
        ("darwin", "x86_64", "", "", "this is darwin on x86_64:"),
    ],
)
def test_triton_needs_the_machine_of_its_wheel(
    machine: Machine, system: str, processor: str, library: str, version: str, here: str
) -> None:
    machine.runs(system, processor, library, version)
    why = machines.lacks("triton")
    assert why.startswith("triton needs Linux on x86_64 with glibc 2.35 or later")
    assert here in why
    assert "name it with --server" in why


@pytest.mark.parametrize("version", ["2.35", "2.36", "2.41.1", "3.0"])
def test_triton_runs_with_its_glibc_and_later_ones(machine: Machine, version: str) -> None:
    machine.runs("linux", "x86_64", "glibc", version)
    assert machines.lacks("triton") == ""


@pytest.mark.parametrize(("minor", "runs"), [(10, False), (11, True), (12, True), (13, False)])
def test_triton_needs_a_python_that_its_backend_has(machine: Machine, minor: int, runs: bool) -> None:
    machine.python(minor)
    machine.library(beside=True)
    why = machines.lacks("triton")
    if runs:
        assert why == ""
    else:
        assert f"needs Python 3.11 or 3.12, and this is 3.{minor}" in why


def test_triton_needs_pythons_shared_library(machine: Machine) -> None:
    """The library may lie beside Python, as in a conda environment, or be installed in the system."""
    machine.library(known=True)
    assert machines.lacks("triton") == ""
    machine.library()
    why = machines.lacks("triton")
    assert "lacks (libpython3.11.so.1.0)" in why
    assert "apt-get install libpython3.11" in why


def test_other_servers_need_no_special_machine(machine: Machine) -> None:
    machine.runs("darwin", "arm64", "", "")
    machine.python(14)
    machine.library()
    assert {machines.lacks(kind) for kind in kinds.KINDS if kind != "triton"} == {""}


def test_nothing_is_installed_where_it_cannot_run(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(environments.VARIABLE, str(tmp_path / "servers"))
    machine.runs("linux", "aarch64", "glibc", "2.36")
    with pytest.raises(environments.CannotInstall, match="this is linux on aarch64"):
        environments.install("triton")
    assert not (tmp_path / "servers").exists()


def test_a_server_that_was_installed_before_the_machine_changed_is_not_started(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """An environment may outlive the library that its server needs, as when the system is upgraded."""
    monkeypatch.setattr(environments, "installed", lambda kind: tmp_path)
    assert availability.missing("triton") == ""
    machine.library()
    assert "apt-get install libpython3.11" in availability.missing("triton")


def test_this_machine_is_judged_by_what_it_is() -> None:
    """Without any patch, the checks agree with the machine: glibc's own version, and a Python that can be embedded only
    if its library can be loaded."""
    glibc = ctypes.CDLL(None)
    glibc.gnu_get_libc_version.restype = ctypes.c_char_p
    major, minor = (int(part) for part in glibc.gnu_get_libc_version().decode().split(".")[:2])
    name = f"libpython3.{sys.version_info.minor}.so.1.0"
    try:
        ctypes.CDLL(os.path.join(sysconfig.get_config_var("LIBDIR") or "", name))
        loads = True
    except OSError:
        try:
            ctypes.CDLL(name)
            loads = True
        except OSError:
            loads = False
    fits = platform.machine() == "x86_64" and (major, minor) >= (2, 35) and sys.version_info.minor in (11, 12)
    assert (machines.lacks("triton") == "") is (fits and loads)
