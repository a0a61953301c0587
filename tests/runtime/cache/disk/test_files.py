"""The files that a pod has pulled for its models."""

from pathlib import Path

from mesh.runtime.cache.disk.files import Files
from puller.puller import Puller
from puller.source import Source


async def test_files_are_never_removed_under_the_next_pull(tmp_path: Path) -> None:
    """Twenty times, a pull begins right after the removal of the same model's files, and its own files stay."""
    source = tmp_path / "m.onnx"
    source.write_bytes(b"model")
    files = Files(Puller(directory=tmp_path / "models", file_roots=[tmp_path]))
    for _ in range(20):
        pulled = await files.pull(Source(str(source)), into="m")
        files.discard("other")
        assert pulled.path.read_bytes() == b"model"
        files.discard("m")
    pulled = await files.pull(Source(str(source)), into="m")
    await files.remove("other")
    assert pulled.path.read_bytes() == b"model"
    await files.remove("m")
    assert not pulled.path.exists()
    await files.close()


async def test_files_are_being_removed_from_their_announcement_to_their_end(tmp_path: Path) -> None:
    source = tmp_path / "m.onnx"
    source.write_bytes(b"model")
    files = Files(Puller(directory=tmp_path / "models", file_roots=[tmp_path]))
    await files.pull(Source(str(source)), into="m")
    assert not files.removing
    files.doom("m")
    assert files.removing
    removal = files.discard("m")
    assert files.removing
    await removal
    assert not files.removing
    await files.close()
