"""A fake model server, whose models are as large, slow or broken as their paths say: `python -m tests.support.twin`.

ModelMesh's tests use a server like this one. Everything around the models is the real server's code: the SPI, the
data port, the use board, loads in threads and the queue of calls. Only loading and running a model are replaced. So a
model of 20 MiB takes no memory, a load of a minute ends when a test says so, and evictions, copies, failures and drains
take fractions of a second with real agents, routers and etcd.

The agent pulls files for any server, so a model is a small file. The file's name, the only part of a path that a pull
keeps, describes the model's behaviour: `size=20MiB,load=0.5s,fail=no such layer`.

| word | what the model does |
| --- | --- |
| `size=20MiB` | is measured as that large; 1 MiB otherwise |
| `device=20MiB` | also takes so much of the device's memory, or of the host's if there is no device |
| `value=3` | answers that for each element of its input `x`; 0 otherwise |
| `load=0.5s`, `call=0.5s` | takes so long to be loaded, or for each call, and ends early when told to |
| `gate=NAME` | its load waits until a file of that name exists beside the folder of the pod's models |
| `fail=TEXT` | its load fails with that text |
| `fail=crash`, `fail=hang`, `fail=memory` | its load kills the server, does not end, or needs more memory than exists |
| `fails=1` | only its first load in a server's life fails |
| `at=pod-1+pod-2` | its loads fail in those pods only, by the names of the folders of their models |
| `error=TEXT`, `error=crash` | its calls fail as UNAVAILABLE with that text, or kill the server |
"""

import collections
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np

from mesh.options.values import parse_bytes
from mesh.runtime.server import __main__ as server
from mesh.runtime.server.loads.loader import Loader
from mesh.runtime.server.onnx import making, session
from mesh.runtime.server.onnx.device import CPU, Device
from mesh.runtime.server.v2 import tensors
from mesh.runtime.server.v2.intake import Intake
from mesh.statuses import MeshError, Reason

MODULE = "tests.support.twin"
"""The module for `--server-module`, found from the repository's root, where the tests run."""

ENDLESS = 3600.0  # seconds

DEVICE_MEMORY = 1 << 40
"""Bytes of the fake device of `--device cuda`; the agent decides how much of it is for models."""

_LOOK = 0.005  # seconds between two checks whether a pause should end


@dataclass(frozen=True, slots=True)
class Behaviour:
    size: int = 1 << 20
    device: int = 0
    value: float = 0.0
    load: float = 0.0  # seconds
    call: float = 0.0
    gate: str = ""
    fail: str = ""
    fails: int = 0  # so many times; 0: always
    at: tuple[str, ...] = ()  # names of pods; empty means all
    error: str = ""


def name(**words: object) -> str:
    """Returns the name of a model's file, such as `name(size="20MiB", load="0.5s")`. Raises ValueError for unknown
    words."""
    text = ",".join(f"{key}={value}" for key, value in (words or {"value": 0}).items())
    read(text)
    return text


def content(text: str) -> bytes:
    """Returns the content of a model's file. It has a thousandth of the model's size and no meaning, so larger models
    have larger files."""
    behaviour = read(text)
    return b"\0" * max(1, (behaviour.size + behaviour.device) >> 10)


def read(text: str) -> Behaviour:
    """Returns the behaviour that a file's name describes. Raises ValueError for unknown words."""
    found: dict[str, Any] = {}
    for word in text.split(","):
        key, equals, value = word.partition("=")
        if not equals or key not in _WORDS:
            raise ValueError(f"{word!r} is no word of a fake model's name; the words are {', '.join(_WORDS)}")
        found[key] = _WORDS[key](value)
    return Behaviour(**found)


def _seconds(text: str) -> float:
    return float(text.removesuffix("s"))


_WORDS: Mapping[str, Callable[[str], Any]] = {
    "size": parse_bytes,
    "device": parse_bytes,
    "value": float,
    "load": _seconds,
    "call": _seconds,
    "gate": str,
    "fail": str,
    "fails": int,
    "at": lambda text: tuple(text.split("+")),
    "error": str,
}


@dataclass(frozen=True, slots=True)
class TwinDevice(Device):
    """A fake GPU. Models with `device=` in their names take its memory."""

    taken: collections.Counter[str] = field(default_factory=collections.Counter)

    def memory(self) -> tuple[int, int]:
        """Returns the bytes of device memory in use and in total."""
        return self.taken["bytes"], DEVICE_MEMORY


class TwinSession(session.Session):
    """A model that computes nothing. The server's own code checks and writes its inputs and outputs."""

    __slots__ = ("_behaviour", "_device")

    def __init__(self, behaviour: Behaviour, device: Device) -> None:
        self._behaviour = behaviour
        self._device = device if isinstance(device, TwinDevice) else None
        if self._device is not None:
            self._device.taken["bytes"] += behaviour.device
        self.inputs = {"x": tensors.Tensor("x", tensors.OF_ONNX["tensor(float)"], [-1, -1])}
        self.outputs = {"y": tensors.Tensor("y", tensors.OF_ONNX["tensor(float)"], [-1, -1])}
        self.unsupported = {}
        self.intake = Intake(self.inputs)

    def run(self, names: Sequence[str], feed: Mapping[str, tensors.Array], options: Any) -> list[tensors.Array]:
        """Blocks the calling thread for as long as the file's name says, and then answers or fails as the name says."""
        behaviour = self._behaviour
        if behaviour.error == "crash":
            os.abort()
        if not _pause(behaviour.call, lambda: options.terminate):
            raise MeshError(Reason.CANCELLED, "the call was ended")
        if behaviour.error:
            raise MeshError(Reason.UNAVAILABLE, behaviour.error)
        return [np.full_like(feed["x"], behaviour.value)]

    def close(self) -> None:
        if self._device is not None:
            self._device.taken["bytes"] -= self._behaviour.device


class TwinLoader(Loader):
    """The server's loader, with the work of its threads replaced by the behaviour that the file's name describes."""

    engine = "twin"
    find_device = staticmethod(lambda wanted: TwinDevice("cuda", ()) if wanted == "cuda" else CPU)

    def __init__(self, *parts: Any, **more: Any) -> None:
        super().__init__(*parts, **more)
        self._failed: collections.Counter[str] = collections.Counter()  # number of failed loads by path

    def _make(self, load: Any, turn: making.Turn) -> making.Made:
        path = Path(load.order.path)
        behaviour = read(unquote(path.name))
        folder = path.parents[1]  # the folder of all of the pod's models
        gate = folder.parent / behaviour.gate
        in_time = _pause(behaviour.load, lambda: load.stop.asked)
        while behaviour.gate and in_time and not gate.exists():
            in_time = _pause(_LOOK, lambda: load.stop.asked)
        if not in_time:
            raise MeshError(Reason.CANCELLED, "the load was cancelled")
        if behaviour.fail and (not behaviour.at or folder.name in behaviour.at):
            self._failed[load.order.path] += 1
            if not behaviour.fails or self._failed[load.order.path] <= behaviour.fails:
                _fail(behaviour.fail, lambda: load.stop.asked)
        # As after a warm-up call of one element, so that even a slow model's first call runs outside the event loop.
        pace = (4, max(1000, int(behaviour.call * 1e9)))
        host, device = behaviour.size, behaviour.device
        if self._device.name == "cpu":
            host, device = host + device, 0
        return making.Made(TwinSession(behaviour, self._device), host, device, False, pace)


def _fail(how: str, asked: Callable[[], bool]) -> None:
    if how == "crash":
        os.abort()
    if how == "hang":
        _pause(ENDLESS, asked)
        raise MeshError(Reason.CANCELLED, "the load was cancelled")
    if how == "memory":
        np.zeros(1 << 50, np.uint8)  # the address space itself has no room for it, whatever the limits
    raise MeshError(Reason.LOAD_FAILED, how)


def _pause(seconds: float, asked: Callable[[], bool]) -> bool:
    """Sleeps until the time is over or `asked` returns True. Returns whether `asked` returned False to the end."""
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0 and not asked():
        time.sleep(min(_LOOK, left))
    return not asked()


if __name__ == "__main__":
    server.main(TwinLoader)
