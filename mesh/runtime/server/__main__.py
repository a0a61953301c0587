"""`python -m mesh.runtime.server`: see `settings` for its command line and `process` for what it does."""

import faulthandler
import logging
import os
import sys
from typing import TYPE_CHECKING

import uvloop

from mesh.runtime.server import settings
from mesh.telemetry import logs

if TYPE_CHECKING:
    from mesh.runtime.server.loads.loader import Loader

log = logs.get("mesh.runtime.server")


def main(loading: "type[Loader] | None" = None) -> None:
    """Serves until told to leave. Exit status 0; 1 where it cannot start, 2 where the command line is wrong.

    `loading` makes another server of it, which only answers as this one does: see `process.serve`."""
    given = settings.parse(sys.argv[1:])
    # numpy's linear algebra is not used here, and would start threads of its own, each with its buffers.
    os.environ["OPENBLAS_NUM_THREADS"] = "1"
    faulthandler.enable()  # a model that crashes the process leaves at least the stacks of its threads in the log
    logs.configure(level=given.log_level, fmt=given.log_format, process="model-server")
    from mesh.runtime.server import process  # onnxruntime takes its time: not for a wrong command line

    status = 0
    try:
        status = uvloop.run(process.serve(given, loading))
    except process.CannotStart as error:
        log.error("the model server cannot start", why=str(error))
        status = 1
    # Not by way of the interpreter's own end: a thread may be inside a model that does not return.
    logging.shutdown()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    main()
