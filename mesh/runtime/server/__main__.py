"""`python -m mesh.runtime.server`: the entry point. `settings` has the command line, `process` the process itself."""

import faulthandler
import logging
import os
import sys
from typing import TYPE_CHECKING

import uvloop

from mesh.host import openfiles
from mesh.runtime.port.boards import CannotStart
from mesh.runtime.server import settings
from mesh.runtime.server.onnx import memory
from mesh.telemetry import logs

if TYPE_CHECKING:
    from mesh.runtime.server.loads.loader import Loader

log = logs.get("mesh.runtime.server")


def main(loading: "type[Loader] | None" = None) -> None:
    """Serves until SIGTERM, and exits with 0. Exits with 1 if the server cannot start or continue, and with 2 if the
    command line is wrong.

    `loading` replaces ONNX Runtime: see `process.serve`.
    """
    given = settings.parse(sys.argv[1:])
    openfiles.raise_limit()
    memory.share()  # before there are other threads
    # numpy's linear algebra is not used here; it would start threads, each with its own buffers.
    os.environ["OPENBLAS_NUM_THREADS"] = "1"
    faulthandler.enable()  # a model that crashes the process leaves at least the stacks of its threads in the log
    logs.configure(level=given.log_level, fmt=given.log_format, process="model-server")
    from mesh.runtime.server import process  # imports onnxruntime, too slow for a wrong command line

    status = 0
    try:
        status = uvloop.run(process.serve(given, loading))
    except CannotStart as error:
        log.error("the model server cannot start", why=str(error))
        status = 1
    # The interpreter's own exit would wait for threads, and one may be in a model that never returns.
    logging.shutdown()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    main()
