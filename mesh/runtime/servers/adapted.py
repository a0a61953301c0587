"""The start of a model server that has an adapter, as a child of the pod or outside of it. In both cases, the pod and
the server share a folder."""

import json
import os
import re
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from mesh import process
from mesh.modelservers import availability, environments, kinds, ovms, torchserve
from placement import modeltypes

MODELS = "models"
"""Name of the subfolder from which a server with an adapter reads its models. The folder around it has the same name if
the operator names no folder."""

PRELOAD = "preload"
"""The launcher's own setting: Python packages to import before the server answers."""

DEFAULTS = "defaults"
"""The launcher's own setting: MLServer's settings that apply unless the environment has others."""

_HOST = "127.0.0.1"
_TWO_PORTS = ("torchserve",)  # kinds whose management has a port of its own
_IN_SHELL = ("triton",)  # kinds that start a shell with the paths of models
_PLAIN = re.compile(r"[A-Za-z0-9_./+=@,-]+")

_MLSERVER = {
    "grpc_max_message_length": -1,  # the router's limit counts
    # Models run in the server's own process. A second process would take 200 MB, calls would wait for each other there
    # too, and the launcher does not complete the runtimes there.
    "parallel_workers": 0,
}
"""Settings of every MLServer."""


@dataclass(frozen=True, slots=True)
class Started:
    """A model server to start: its command, folder and environment."""

    words: tuple[str, ...]
    address: str  # of its management, in gRPC's notation
    calls: str  # for inference calls
    folder: Path  # to run it in
    variables: Mapping[str, str]  # of its environment


def begin(kind: str, folder: Path, *, threads: int, types: Collection[str]) -> Started:
    """Writes the settings of a server of this kind, which reads its models below `folder` and takes these model types,
    or all types for an empty collection. Returns what is needed to start the server. Raises OSError, and ValueError if
    the server cannot be started here."""
    if (why := availability.missing(kind)) != "":
        raise ValueError(why)
    if kind in _IN_SHELL and not _PLAIN.fullmatch(str(folder)):
        text = f"{kind} cannot read models below {folder}, because it passes the path to a shell"
        raise ValueError(f"{text}: name a folder without spaces and special characters with --server-models")
    models = folder / MODELS
    models.mkdir(parents=True, exist_ok=True)
    port = process.free_port(_HOST)
    calls = process.free_port(_HOST) if kind in _TWO_PORTS else port
    given = _SETTINGS[kind](models, port, types) | ({"calls_port": calls} if calls != port else {})
    settings = _settings(kind, folder)
    settings.write_text(json.dumps(given))
    # -I: neither this process's PYTHONPATH nor the current folder is on its path.
    words = (str(_python(kind)), "-I", str(environments.launcher_of(kind)), str(settings))
    variables = {name: str(threads) for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}
    return Started(words, f"{_HOST}:{port}", f"{_HOST}:{calls}", folder, variables)


def share(kind: str, folder: Path, *, types: Collection[str]) -> None:
    """Prepares the folder of a server that is started outside the pod, and that may wait for this. Makes the subfolder
    for models, without which Triton does not start. For MLServer, adds the launcher and its settings. Raises
    OSError."""
    models = folder / MODELS
    models.mkdir(parents=True, exist_ok=True)
    prepare(kind, folder)
    if kind != kinds.MLSERVER.name:
        return
    # The server's environment has the other settings: ports, for example.
    given = {PRELOAD: _packages(types), "variables": True, DEFAULTS: _MLSERVER, "model_repository_root": str(models)}
    _settings(kind, folder).write_text(json.dumps(given | {"load_models_at_startup": False}))
    # The launcher is last, because the server waits for it.
    for file in (*environments.companions_of(kind), environments.launcher_of(kind)):
        copy = folder / f".{file.name}"
        shutil.copyfile(file, copy)
        copy.replace(folder / file.name)  # whole at once


def prepare(kind: str, folder: Path) -> None:
    """Makes the folder of models and the configuration without which OVMS does not start. Does nothing for other kinds
    of servers. Raises OSError."""
    if kind == kinds.OVMS.name:
        ovms.prepare(folder / MODELS)


def _settings(kind: str, folder: Path) -> Path:
    """Returns the file of the launcher's settings. It is not `settings.json`, which MLServer reads and which the
    server's owner may have written."""
    return folder / f"{environments.launcher_of(kind).stem}.json"


def _python(kind: str) -> Path:
    """Returns the Python interpreter that runs a kind of server. Raises ValueError."""
    if kinds.KINDS[kind].found:
        return torchserve.find().python
    return environments.python_of(environments.folder_of(kind))


def _packages(types: Collection[str]) -> list[str]:
    """Returns the packages of MLServer's runtimes for some model types, or for all if `types` is empty. Unless they are
    imported first, the first model of each type pays for its library, in time and, on the pod's books, in memory."""
    known = kinds.MLSERVER.served(allow_code=True)
    wanted = {modeltypes.name_of(one) for one in types} or known
    return [f"mlserver_{name}" for name in known if name in wanted]


def _mlserver(models: Path, port: int, types: Collection[str]) -> dict[str, object]:
    return {
        PRELOAD: _packages(types),
        "debug": False,  # or it logs every call
        "host": _HOST,
        "grpc_port": port,
        "http_port": 0,  # any: nothing calls it
        "metrics_endpoint": None,
        "model_repository_root": str(models),
        "load_models_at_startup": False,
        **_MLSERVER,
    }


def _triton(models: Path, port: int, types: Collection[str]) -> dict[str, object]:
    return {
        "host": _HOST,
        "port": port,
        "metrics_port": process.free_port(_HOST),
        "models": str(models),
        "folder": str(models.parent),
        "owner": os.getpid(),
        "load_threads": 2,  # one load at a time is measured, and its unloads must not wait
    }


def _torchserve(models: Path, port: int, types: Collection[str]) -> dict[str, object]:
    java = str(torchserve.find().java)
    return {"host": _HOST, "management_port": port, "models": str(models), "folder": str(models.parent), "java": java}


_SETTINGS = {"mlserver": _mlserver, "triton": _triton, "torchserve": _torchserve}
