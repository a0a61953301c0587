"""The adapter for MLServer, which loads models from its repository folder when its repository API says so.

MLServer describes a model by a file, `model-settings.json`, and searches its whole repository for these files at each
load. So a model's file is there only while the model is being loaded; afterwards it has another name. Otherwise each
load would read the files of all models, and a file deep in one model's folder could pass for another model.

MLServer has no list of what it holds, so the folders' ids serve as one when an agent starts beside a server that others
have used. It may then hold a model whose load was cancelled, and which never becomes ready. That is why a server
counts as ready as soon as it is live.
"""

import asyncio
import json
import threading
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import grpc

from mesh.modelfiles import mlflow, sniffing, usercode
from mesh.pb import modelruntime_pb2 as pb
from mesh.runtime.relay.adapters import contents, keys, readiness, refusals, schemas, sizes
from mesh.runtime.relay.adapters.folders import Folders, ModelFolders
from mesh.runtime.relay.adapters.repository import Repository
from mesh.runtime.relay.control import Trailers
from mesh.statuses import MeshError, Reason
from mesh.telemetry import logs

log = logs.get(__name__)

SETTINGS = "model-settings.json"
_LOADS = 1  # at a time: loads take turns in its event loop anyhow
_LOADED = "loaded.json"  # the same file, once MLServer has read it


@dataclass(frozen=True, slots=True)
class Runtime:
    """One of MLServer's inference runtimes, and the files of its models."""

    implementation: str
    names: tuple[str, ...]  # in the order in which a folder is searched
    suffixes: tuple[str, ...]
    folder: bool = False  # it loads the folder that holds the first of `names`
    code: bool = False  # loading a model may run code in it
    content_type: str = ""  # of requests that name none, if the runtime itself has no default


RUNTIMES = {
    "sklearn": Runtime(
        "mlserver_sklearn.SKLearnModel",
        ("model.joblib", "model.pickle", "model.pkl"),
        (".joblib", ".pickle", ".pkl"),
        code=True,
    ),
    "xgboost": Runtime(
        "mlserver_xgboost.XGBoostModel",
        ("model.bst", "model.json", "model.ubj"),
        (".bst", ".json", ".ubj", ".xgb"),
    ),
    "lightgbm": Runtime(
        "mlserver_lightgbm.LightGBMModel", ("model.txt", "model.bst", "model.lgb"), (".txt", ".bst", ".lgb")
    ),
    "catboost": Runtime("mlserver_catboost.CatboostModel", ("model.cbm", "model.bin"), (".cbm", ".bin")),
    "mlflow": Runtime(
        "mlserver_mlflow.MLflowRuntime", (mlflow.DESCRIPTION,), (), folder=True, code=True, content_type="np"
    ),
    "python": Runtime("mlserver_python.PythonModel", (usercode.CODE,), (usercode.SUFFIX,), folder=True, code=True),
    "huggingface": Runtime("mlserver_huggingface.HuggingFaceRuntime", ("config.json",), (), folder=True, code=True),
}
"""MLServer's runtimes by model type. A folder with its own model-settings.json may name any other."""

_NO_CODE = frozenset(runtime.implementation for runtime in RUNTIMES.values() if not runtime.code)

_ENVIRONMENTS = frozenset({"environment_path", "environment_tarball"})
"""Parameters by which an MLServer with parallel workers runs a model in another environment."""

_ENDINGS = {sniffing.XGBOOST_JSON: ".json", sniffing.XGBOOST_UBJ: ".ubj"}
"""Endings of files whose library tells their format by the ending. Other files keep theirs."""

_MODEL = "model"  # the name of the link: without characters that MLServer or MLflow would decode

_SIZE = "size_bytes"  # the parameter in which the runtime for Python code reports the size that the code states

_METHODS = {f"inference.GRPCInferenceService/{name}": [1] for name in ("ModelInfer", "ModelMetadata", "ModelReady")}


class MLServer:
    """The control of one MLServer."""

    def __init__(self, channel: grpc.aio.Channel, root: Path, *, load_timeout: float, allow_code: bool) -> None:
        """Makes the control of a server whose repository is the folder `models` in `root`. `load_timeout` is in
        seconds."""
        self.former = False
        self.takes_versions = False
        self._repository = Repository(channel)
        self._folders = Folders(root)
        self._load_timeout = load_timeout
        self._allow_code = allow_code

    def resume(self, *, former: bool) -> None:
        """Continues with a server that reported to a former relay: all that is needed is in the folders."""

    def name(self, model_id: str) -> str:
        """Returns the id, which MLServer takes as a name."""
        return model_id

    async def status(self, *, timeout: float) -> tuple[pb.RuntimeStatusResponse, Trailers]:
        """Returns READY if the server is live, after it has dropped all models, and otherwise STARTING."""
        if not await self._repository.live(timeout=timeout):
            return pb.RuntimeStatusResponse(status=pb.RuntimeStatusResponse.STARTING), ()
        for model_id in {*self._folders.ids(), *await self._repository.index(timeout=timeout)}:
            if model_id:
                await self.unload(pb.UnloadModelRequest(modelId=model_id), timeout=timeout)
        version = await self._repository.version(timeout=timeout)
        return readiness.ready(version, _METHODS, loads=_LOADS, load_timeout=self._load_timeout), ()

    async def load(
        self, request: pb.LoadModelRequest, *, timeout: float | None
    ) -> tuple[pb.LoadModelResponse, Trailers]:
        """Makes the model's folder, and has the server load it. Raises AioRpcError if the server cannot be reached or
        is too slow, and MeshError if the model cannot be loaded."""
        model_id = request.modelId
        try:
            async with refusals.within(timeout):
                place = await self._folders.fill(model_id, partial(self._lay_out, request))
                await self._repository.load(model_id, timeout=timeout)
                if not await self._repository.ready(model_id, timeout=timeout):
                    await self.unload(pb.UnloadModelRequest(modelId=model_id), timeout=timeout)
                    text = "MLServer reports that the model is not ready: the model's own load() must return True"
                    raise MeshError(Reason.LOAD_FAILED, text)
                await asyncio.to_thread((place.read / SETTINGS).rename, place.read / _LOADED)
        except grpc.aio.AioRpcError as error:
            meaning = self._meaning(error, request)
            if isinstance(meaning, MeshError):  # otherwise an unload follows
                await asyncio.to_thread(self._folders.remove, model_id)
            raise meaning from error
        return pb.LoadModelResponse(), await self._folders.reported(model_id)

    async def unload(self, request: pb.UnloadModelRequest, *, timeout: float | None) -> None:
        """Has the server unload a model, and removes its folder. An unknown model is no error."""
        try:
            await self._repository.unload(request.modelId, timeout=timeout)
        except grpc.aio.AioRpcError as error:
            if error.code() not in (grpc.StatusCode.NOT_FOUND, grpc.StatusCode.INVALID_ARGUMENT):
                raise
        await asyncio.to_thread(self._folders.remove, request.modelId)

    async def size(
        self, request: pb.ModelSizeRequest, *, timeout: float | None
    ) -> tuple[pb.ModelSizeResponse, Trailers]:
        """Returns the size that a model's Python code states, and 0 for other models, whose size MLServer does not
        know. Raises AioRpcError with NOT_FOUND if the server does not have the model."""
        parameters = await self._repository.describe(request.modelId, timeout=timeout)
        return pb.ModelSizeResponse(sizeInBytes=max(0, parameters.get(_SIZE, 0))), ()

    async def predict(self, request: pb.PredictModelSizeRequest, *, timeout: float) -> pb.PredictModelSizeResponse:
        """Returns the size that the model's files suggest."""
        return sizes.predicted(request)

    # --- the model's folder

    def _lay_out(self, request: pb.LoadModelRequest, place: ModelFolders, stop: threading.Event) -> ModelFolders:
        """Writes the model's settings, and makes the links that they need. Raises MeshError and OSError."""
        (place.read / SETTINGS).write_text(json.dumps(self._settings(request, place, stop)))
        return place

    def _settings(self, request: pb.LoadModelRequest, place: ModelFolders, stop: threading.Event) -> dict[str, Any]:
        """Returns the model's settings, and makes the links that they need. Raises MeshError."""
        key = keys.key_of(request)
        pulled = contents.opened(Path(request.modelPath), place.files, stop)
        own = contents.newest(pulled) / SETTINGS if pulled.is_dir() else None
        if own is not None and own.is_file():
            settings = self._of_users(own, place)
        else:
            settings = self._generated(keys.type_of(request), pulled, place)
        return settings | {"name": request.modelId} | schemas.schema_of(key)

    def _of_users(self, file: Path, place: ModelFolders) -> dict[str, Any]:
        """Returns the settings that came with a model, with their path made absolute. Raises MeshError."""
        settings = contents.read_json(file, SETTINGS)
        if not isinstance(settings, dict) or not isinstance(settings.get("parameters", {}), dict):
            raise contents.bad(f"{SETTINGS} must be a JSON object whose parameters, if any, are an object too")
        parameters = dict(settings.get("parameters", {}))
        implementation = settings.get("implementation", "")
        if not isinstance(implementation, str):
            raise contents.bad(f"implementation in {SETTINGS} must be the name of a class, not {implementation!r:.100}")
        only_data = implementation in _NO_CODE
        if (uri := parameters.get("uri", "." if only_data else None)) is not None:
            inside = _inside(file.parent, uri)
            contents.link(file.parent, place.files / _MODEL)
            parameters["uri"] = str(place.files / _MODEL / inside)
        for name in _ENVIRONMENTS & parameters.keys():
            self._check_code(f"the Python environment that the model's {SETTINGS} names ({name})")
        if not only_data:
            self._check_code(
                f"the implementation {implementation} that the model's {SETTINGS} names"
                if implementation
                else f"a model whose {SETTINGS} names no implementation"
            )
            self._link_modules(file.parent, place)
        return settings | {"parameters": parameters}

    def _link_modules(self, source: Path, place: ModelFolders) -> None:
        """Makes links to all that lies beside a model's own settings, where MLServer looks for modules. Raises
        MeshError if another model has a module with the same name, or a subfolder has settings of its own."""
        nested = next((file for file in source.rglob(SETTINGS) if file.parent != source), None)
        if nested is not None:
            text = f"MLServer would mix up the model's {SETTINGS} with that in a subfolder"
            raise contents.bad(f"{text}: remove {nested.relative_to(source)}")
        entries = [entry for entry in source.iterdir() if entry.name != SETTINGS]
        modules = {_module(entry) for entry in entries} - {""}
        for other in self._folders.ids():
            theirs = self._folders.of(other).read
            taken = sorted(modules & {_module(entry) for entry in theirs.iterdir()}) if theirs.is_dir() else []
            if taken and theirs != place.read:
                log.warning("two models have a Python module of the same name", module=taken[0], model=other)
                text = f"another model in this server has a Python module with the same name, {taken[0]}"
                raise MeshError(Reason.PRECONDITION, f"{text}, and Python can hold only one of them: rename yours")
        for entry in entries:
            contents.link(entry, place.read / entry.name)

    def _generated(self, model_type: str, pulled: Path, place: ModelFolders) -> dict[str, Any]:
        runtime = RUNTIMES.get(model_type)
        if runtime is None:
            text = f"models of type {model_type} need a folder with {SETTINGS}; without it, MLServer takes the types "
            raise contents.bad(text + ", ".join(RUNTIMES))
        if runtime.folder:
            self._check_code(f"a model of type {model_type}")
            if model_type == usercode.TYPE:
                contents.python_code(pulled, place.files / _MODEL)
                return _described(runtime.implementation, place.files / _MODEL)
            # MLflow decodes percent signs in the path of a folder, and does not follow links out of it.
            contents.mirror(contents.with_file(pulled, runtime.names[0]), place.files / _MODEL)
            return _described(runtime.implementation, place.files / _MODEL, runtime.content_type)
        found = _find(model_type, runtime, pulled)
        implementation = runtime.implementation
        if _is_pickle(found.kind):  # those of all libraries are loaded in the same way
            runtime = RUNTIMES["sklearn"]
            implementation = runtime.implementation
        elif found.kind is not None and found.kind.archive and not runtime.code:
            raise contents.bad(f"the file is {found.kind.what}, but cannot be read as an archive: pack the model again")
        elif found.kind is not None and found.kind.type not in ("", model_type):
            raise contents.bad(f"the file is {found.kind.what}: register it with --type {found.kind.type}")
        if runtime.code:
            self._check_code(found.kind.what if found.kind is not None and _is_pickle(found.kind) else "a pickle")
        ending = found.path.suffix if found.path.suffix.lower() in runtime.suffixes else ""
        name = place.files / f"{_MODEL}{_ENDINGS.get(found.kind or sniffing.EMPTY, ending)}"
        contents.link(found.path, name)
        return _described(implementation, name)

    def _check_code(self, what: str) -> None:
        refusals.check_code(f"{what} can run code when the model is loaded", allowed=self._allow_code)

    def _meaning(self, error: grpc.aio.AioRpcError, request: pb.LoadModelRequest) -> Exception:
        if refusals.of_the_way(error):
            return error
        if error.code() is grpc.StatusCode.NOT_FOUND:
            text = f"MLServer cannot use the model's {SETTINGS}; MLServer's log has the cause"
            return MeshError(Reason.LOAD_FAILED, text)
        place = self._folders.of(request.modelId)
        return refusals.cannot_load("MLServer", refusals.text_of(error), request, place, request.modelId)


def _is_pickle(kind: sniffing.Kind | None) -> bool:
    return kind is not None and kind.code and kind.type in ("", *RUNTIMES)


def _described(implementation: str, uri: Path, content_type: str = "") -> dict[str, Any]:
    parameters = {"uri": str(uri)} | ({"content_type": content_type} if content_type else {})
    return {"implementation": implementation, "parameters": parameters}


def _find(model_type: str, runtime: Runtime, pulled: Path) -> contents.FoundModel:
    if (pulled / mlflow.DESCRIPTION).is_file():
        try:
            file = mlflow.file_of(pulled, model_type)
        except mlflow.BadDescription as error:
            raise contents.bad(str(error)) from error
        return contents.FoundModel(file, sniffing.look(file))
    return contents.find(pulled, runtime.names, runtime.suffixes)


def _inside(folder: Path, uri: Any) -> Path:
    """Returns the path that settings name, relative to the folder of the settings. Raises MeshError for a path that is
    missing or outside of that folder."""
    try:
        split = urlsplit(uri) if isinstance(uri, str) and "\0" not in uri else None
        if split is None or split.scheme not in ("", "file") or split.netloc:
            raise ValueError
        path = (folder / (unquote(split.path) if split.scheme else uri)).resolve()
        there = path.exists()
    except (ValueError, OSError, RuntimeError) as error:  # names that are too long, and links that lead to themselves
        text = f"parameters.uri in {SETTINGS} must be a path in the model's folder, not {uri!r:.200}"
        raise contents.bad(text) from error
    if not path.is_relative_to(folder.resolve()):
        raise contents.bad(f"parameters.uri in {SETTINGS} leads out of the model's folder: {uri!r}; name a path in it")
    if not there:
        raise contents.bad(f"{uri}, which {SETTINGS} names, is missing: add it to the model's folder")
    return path.relative_to(folder.resolve())


def _module(entry: Path) -> str:
    """Returns the name by which Python would import a file or folder, or ""."""
    if entry.suffix == ".py":
        return entry.stem
    return entry.name if entry.is_dir() and entry.name.isidentifier() else ""
