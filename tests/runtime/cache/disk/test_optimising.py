"""Optimisation of models after their loads, by the real optimiser, and what happens to the optimised form."""

import asyncio
import json
import signal
from pathlib import Path

import pytest

from mesh.runtime.cache.disk import optimising
from mesh.runtime.cache.disk.optimising import LEAST_MS, MAX_BYTES, Optimising, processor
from mesh.runtime.presence.ondisk import OnDisk
from mesh.schema.idset import IdSet
from puller.puller import Pulled
from tests.support import models
from tests.support.waiting import until

SERVER = "mesh 0.1 (onnxruntime 1.99; cpu)"


class Shelf:
    """A store that keeps optimised forms if the test allows it."""

    def __init__(self, *, wants: bool = True) -> None:
        self.kept: list[tuple[str, str, str]] = []
        self._wants = wants

    def current(self, into: str, pulled: Pulled) -> bool:
        return True

    async def keep(self, into: str, pulled: Pulled, tag: str, path: Path) -> bool:
        assert path.is_file()
        self.kept.append((into, pulled.digest, tag))
        return self._wants


def pulled(
    tmp_path: Path, name: str = "m", *, content: str = "c", size: int = 0, derived: Path | None = None
) -> Pulled:
    folder = tmp_path / name
    folder.mkdir(exist_ok=True)
    path = folder / "m.onnx"
    path.write_bytes(b"not a model")
    return Pulled(path=path, bytes=size or 11, source="s", key="{}", digest=content, derived=derived)


@pytest.fixture
def make():
    """Returns a function that starts an `Optimising` for one of Mesh's own model servers, by default on a CPU."""
    running = []

    def make(shelf: Shelf, *, free_bytes: int = 2**40, version: str = SERVER, device: str = "cpu") -> Optimising:
        made = Optimising(shelf, free_bytes=lambda: free_bytes)
        made.server(version, device)
        running.append(asyncio.ensure_future(made.run()))
        return made

    yield make
    for task in running:
        task.cancel()


@pytest.mark.long
async def test_a_slow_load_gets_its_form_and_the_next_one_of_equal_files_does_not(make, tmp_path):
    """The real optimiser runs in a separate process. A form that is worth keeping is named after the content, the
    onnxruntime version and the processor. Equal files are not looked at again."""
    shelf = Shelf()
    made = make(shelf)
    one = pulled(tmp_path)
    one.path.write_bytes(models.intricate(2.0))
    made.loaded("m", one, LEAST_MS)
    await until(lambda: made.statistics().made + made.statistics().in_vain == 1, timeout=60)
    if made.statistics().made:
        assert shelf.kept == [("m", "c", f"onnxruntime 1.99 on {processor()}")]
    made.loaded("m2", one, 1000.0)
    assert made.statistics().waiting == 0
    assert not list(tmp_path.glob("mesh-optimise-*"))


@pytest.mark.parametrize(
    "change",
    [
        {"ms": LEAST_MS - 1},
        {"content": ""},
        {"size": MAX_BYTES + 1},
        {"derived": Path("/x")},
        {"device": "cuda"},
        {"version": "somebody else's server"},
    ],
    ids=lambda change: next(iter(change)),
)
async def test_what_is_not_worth_a_look(make, tmp_path, change):
    """A model is not optimised if it loads quickly, has no digest, is too large or is already optimised, or if the
    server could not use the result."""
    change = dict(change)
    server = {name: change.pop(name) for name in ("device", "version") if name in change}
    ms = change.pop("ms", 1000.0)
    made = make(Shelf(), **server)
    made.loaded("m", pulled(tmp_path, **change), ms)
    assert made.statistics().waiting == 0


async def test_a_bad_model_or_a_lack_of_memory_is_no_trouble(make, tmp_path):
    """A model that the optimiser rejects is counted. A model for which memory was too short is not counted, and is
    looked at again after its next load."""
    made = make(Shelf())
    made.loaded("m", pulled(tmp_path), 1000.0)
    await until(lambda: made.statistics().in_vain == 1, timeout=60)
    short = make(Shelf(), free_bytes=1)
    short.loaded("m", pulled(tmp_path), 1000.0)
    await until(lambda: short.statistics().waiting == 0)
    short.loaded("m", pulled(tmp_path), 1000.0)
    assert short.statistics().waiting == 1
    assert short.statistics().in_vain == 0


async def test_files_that_were_removed_in_the_meantime(make, tmp_path, monkeypatch):
    """The store refuses the optimised form, as it does once the model's files have been removed, and the attempt is
    counted."""

    async def worth(source: Path, target: Path) -> dict[str, object]:
        target.write_bytes(b"form")
        return {"worth": True}

    monkeypatch.setattr(optimising, "_run", worth)
    made = make(Shelf(wants=False))
    made.loaded("m", pulled(tmp_path), 1000.0)
    await until(lambda: made.statistics().in_vain == 1)


async def test_an_optimiser_that_hangs_is_ended(tmp_path, monkeypatch):
    """An optimiser that exceeds its time limit is killed, and the result says so."""
    spawned = []
    spawn = optimising.process.spawn

    async def hanging(argv, **more):
        spawned.append(await spawn(["sleep", "600"], **more))
        return spawned[0]

    monkeypatch.setattr(optimising.process, "spawn", hanging)
    monkeypatch.setattr(optimising, "_TIMEOUT", 0.01)
    told = await optimising._run(tmp_path / "a", tmp_path / "b")
    assert "took more than" in json.dumps(told)
    assert await spawned[0].wait(30) == -signal.SIGKILL


def test_processors_are_told_apart_by_what_they_can_do(tmp_path):
    """Processors are identified by their set of features. The order in which the kernel lists the features, and the
    clock rate, do not matter."""
    info = tmp_path / "cpuinfo"
    info.write_text("flags\t: fpu sse2 avx\ncpu MHz : 1\n")
    one = processor(info)
    info.write_text("cpu MHz : 2\nflags\t: avx fpu sse2\n")
    assert processor(info) == one
    info.write_text("flags\t: fpu sse2\n")
    assert processor(info) != one
    assert processor(tmp_path / "none")


def test_what_is_on_disk_is_written_when_it_is_asked_for():
    """The index of models on disk is encoded only when it is read: once after a thousand changes, and not at all
    without a change."""
    asked = 0
    ids = ["a", "b"]

    def remembered() -> list[str]:
        nonlocal asked
        asked += 1
        return ids

    disk = OnDisk(remembered)
    assert (disk.text, asked) == ("", 0)
    for _ in range(1000):
        disk.changed("a", True)
    assert disk.text == disk.text == IdSet.of(ids).encode()
    assert asked == 1
    ids.clear()
    disk.changed("a", False)
    assert disk.text == IdSet.of([]).encode()
