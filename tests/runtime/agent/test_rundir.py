"""Run folders of agents, including those that killed agents leave behind."""

import fcntl
import os
import threading
from pathlib import Path

import pytest

from mesh.runtime.agent import rundir
from mesh.runtime.agent.rundir import RunDir


def test_a_run_folder_goes_with_its_process_and_one_left_behind_with_the_next(tmp_path: Path) -> None:
    """An agent removes its own run folder when it ends. When it starts, it removes the folders that killed agents left,
    but neither those of running agents nor folders without a lock."""
    alive = RunDir(tmp_path)
    left = tmp_path / "mesh-pod-left"
    left.mkdir()
    (left / "lock").touch()
    (left / "board").touch()
    strange = tmp_path / "mesh-pod-strange"
    strange.mkdir()
    other = RunDir(tmp_path)
    assert alive.path.exists()
    assert other.path.exists()
    assert not left.exists()
    assert strange.exists()
    assert (other.path.stat().st_mode & 0o777) == 0o700
    other.close()
    alive.close()
    assert not alive.path.exists()


def test_a_folder_left_by_a_former_life_is_shown_to_the_next(tmp_path: Path) -> None:
    """An agent is shown the run folder that its killed predecessor left, unless the predecessor disowned it. A folder
    without an owner is shown to no agent."""
    seen: list[str] = []

    def killed(whose: str, *, disowned: bool = False) -> None:
        run = RunDir(tmp_path, whose=whose)
        (run.path / "board").write_text(whose)
        if disowned:
            run.disown()
        os.close(run._lock)  # as the kernel does

    def note(folder: Path) -> None:
        seen.append((folder / "board").read_text())

    for whose, disowned in (("a", False), ("a", True), ("", False)):
        killed(whose, disowned=disowned)
        RunDir(tmp_path, whose="a", on_left=note).close()
    killed("")
    RunDir(tmp_path, whose="", on_left=note).close()
    assert seen == ["a"]
    assert not list(tmp_path.iterdir())


def test_others_leave_the_folder_to_the_next_life_for_a_while(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Agents of other pods keep a dead pod's run folder for a while, in case the pod restarts, but remove the models in
    it at once. If another agent is looking at the folder, its owner waits."""
    seen: list[str] = []

    def killed() -> Path:
        run = RunDir(tmp_path, whose="a")
        (run.path / "board").touch()
        (run.path / "models").mkdir()
        (run.path / "models" / "model.onnx").touch()
        os.close(run._lock)
        return run.path

    left = killed()
    for whose in ("b", "", "b"):
        RunDir(tmp_path, whose=whose, on_left=lambda folder: seen.append(f"theirs: {folder}")).close()
    assert not (left / "models").exists()
    RunDir(tmp_path, whose="a", on_left=lambda folder: seen.append(str(folder / "board"))).close()
    assert seen == [str(left / "board")]
    assert not list(tmp_path.iterdir())

    left = killed()
    looks = os.open(left / "lock", os.O_RDWR)
    fcntl.flock(looks, fcntl.LOCK_EX)
    other = threading.Timer(0.05, os.close, [looks])
    other.start()
    RunDir(tmp_path, whose="a", on_left=lambda folder: seen.append("waited for")).close()
    other.join()
    assert seen[1:] == ["waited for"]

    killed()
    monkeypatch.setattr(rundir, "KEPT", 0.0)
    RunDir(tmp_path, whose="b").close()
    assert not list(tmp_path.iterdir())


def test_the_run_folder_is_short() -> None:
    """The path of a unix socket may have at most 107 bytes."""
    run = RunDir()
    assert len(os.fsencode(run.path / "spi-1000")) < 100
    run.close()
