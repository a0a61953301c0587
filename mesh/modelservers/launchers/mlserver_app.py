"""Starts MLServer from its settings: `python mlserver_app.py SETTINGS.json`, in MLServer's own environment.

MLServer's own command reads the current folder and the variables MLSERVER_*, and puts the repository on Python's path,
where the folder of a model could hide a package of the same name. None of that happens here.
"""

import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Any


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
    for name in list(os.environ):
        if name.startswith("MLSERVER_"):
            del os.environ[name]
    from mlserver.utils import install_uvloop_event_loop

    install_uvloop_event_loop()
    asyncio.run(serve(json.loads(Path(sys.argv[1]).read_text())))


if __name__ == "__main__":
    main()
