"""Starts MLServer from its settings: `python mlserver_app.py mlserver_app.json`, in MLServer's own environment.

MLServer's own command reads the current folder and the variables MLSERVER_*, and puts the repository on Python's path,
where the folder of a model could hide a package of the same name. None of that happens here, except that the variables
count if the settings say so (`variables`), as they do for a server in a container of its own. Settings in `defaults`
count unless such a variable is set.

The folder of this file is the last on Python's path. It holds the runtime for Python code of users, `mlserver_python`.

The packages of the runtimes are imported first: `preload` in the settings lists them. Two of them are completed,
because MLServer 1.7 loads every CatBoost model as a classifier, and cannot load XGBoost's rankers.
"""

import asyncio
import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any


def preload(names: list[str]) -> None:
    """Imports packages. Reports one that cannot be imported on stderr; models of other types are served
    nevertheless."""
    for name in names:
        try:
            importlib.import_module(name)
            if name in COMPLETED:
                COMPLETED[name]()
        except Exception as error:
            print(f"{name} cannot be used: {error!r}", file=sys.stderr)


def complete_catboost() -> None:
    """Makes MLServer's runtime serve CatBoost's regressors and rankers too."""
    library, runtime, uri_of = _packages("catboost", "CatboostModel")
    load = runtime.load

    async def load_any(self: Any) -> bool:
        loaded: bool = await load(self)
        if not len(self._model.classes_):
            self._model = library.CatBoostRegressor().load_model(await uri_of(self._settings))
        return loaded

    runtime.load = load_any


def complete_xgboost() -> None:
    """Makes MLServer's runtime serve XGBoost's rankers too."""
    library, runtime, uri_of = _packages("xgboost", "XGBoostModel")
    load = runtime.load

    async def load_any(self: Any) -> bool:
        try:
            loaded: bool = await load(self)
        except TypeError:  # neither a regressor nor a classifier
            self._model = library.XGBRanker()
            self._model.load_model(await uri_of(self._settings))
            return True
        return loaded

    runtime.load = load_any


def _packages(library: str, runtime: str) -> tuple[Any, Any, Any]:
    """Returns a library, MLServer's runtime for it, and MLServer's function that finds the file of a model."""
    there = getattr(importlib.import_module(f"mlserver_{library}"), runtime)
    return importlib.import_module(library), there, importlib.import_module("mlserver.utils").get_model_uri


COMPLETED = {"mlserver_catboost": complete_catboost, "mlserver_xgboost": complete_xgboost}
"""The functions that complete packages, by the packages' names."""


async def serve(given: dict[str, Any]) -> None:
    """Serves until SIGTERM."""
    from mlserver.server import MLServer
    from mlserver.settings import Settings

    settings = Settings(**given)
    # Two servers must not share a port, which gRPC allows by default.
    settings._custom_grpc_server_settings = {"grpc.so_reuseport": 0}
    await MLServer(settings).start([])


def main() -> None:
    """Runs the server."""
    given = json.loads(Path(sys.argv[1]).read_text())
    if not given.pop("variables", False):
        for name in list(os.environ):
            if name.startswith("MLSERVER_"):
                del os.environ[name]
    for name, value in given.pop("defaults", {}).items():
        if f"MLSERVER_{name.upper()}" not in os.environ:
            given[name] = value
    sys.path.append(str(Path(__file__).resolve().parent))
    from mlserver.utils import install_uvloop_event_loop

    install_uvloop_event_loop()
    preload(given.pop("preload"))
    asyncio.run(serve(given))


if __name__ == "__main__":
    main()
