"""The folders of a server's models: what they hold on the pod's disk, and what is left of them."""

import os
import threading
from pathlib import Path

import pytest

from mesh.runtime.relay.adapters import contents
from mesh.runtime.relay.adapters.folders import Folders, ModelFolders


@pytest.fixture
def pulled(tmp_path: Path) -> Path:
    """Returns a folder with two files of 500 and 300 bytes, as if an agent had pulled them."""
    folder = tmp_path / "pulled"
    (folder / "deep").mkdir(parents=True)
    (folder / "a").write_bytes(b"x" * 500)
    (folder / "deep" / "b").write_bytes(b"y" * 300)
    return folder


async def reported(folders: Folders, model_id: str) -> int:
    return sum(int(value) for name, value in await folders.reported(model_id) if name == "mesh-disk-bytes")


async def test_only_bytes_that_were_not_pulled_are_reported(tmp_path: Path, pulled: Path) -> None:
    """Symbolic and hard links to pulled files take no room, but new files do. A file with two names in the folder
    counts once."""
    folders = Folders(tmp_path / "server")

    def links(place: ModelFolders, stop: threading.Event) -> None:
        contents.link(pulled, place.files / "link")
        contents.tree_of_links(pulled, place.files / "tree")
        contents.mirror(pulled, place.files / "mirror")

    def copies(place: ModelFolders, stop: threading.Event) -> None:
        (place.files / "unpacked").mkdir()
        (place.files / "unpacked" / "new").write_bytes(b"z" * 70)
        contents.mirror(place.files / "unpacked", place.files / "mirror")

    await folders.fill("links", links)
    assert await folders.reported("links") == ()
    await folders.fill("copies", copies)
    assert await reported(folders, "copies") == 70
    folders.remove("copies")
    assert await folders.reported("copies") == ()


async def test_copies_on_another_file_system_are_reported(
    tmp_path: Path, pulled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    folders = Folders(tmp_path / "server")
    await folders.fill("m", lambda place, stop: contents.mirror(pulled, place.files / "mirror"))
    assert await reported(folders, "m") == 800
