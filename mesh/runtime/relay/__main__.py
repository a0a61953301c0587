"""`python -m mesh.runtime.relay`: the entry point. `settings` has the command line, `process` the process itself."""

import faulthandler
import logging
import os
import sys

import uvloop

from mesh.host import openfiles
from mesh.runtime.port.boards import CannotStart
from mesh.runtime.relay import process, settings
from mesh.telemetry import logs

log = logs.get("mesh.runtime.relay")


def main() -> None:
    """Relays calls until SIGTERM, and exits with 0. Exits with 1 if the relay cannot start or continue, with 2 if the
    command line is wrong, and with a status of `mesh.runtime.port.outcomes` if the model server is lost."""
    given = settings.parse(sys.argv[1:])
    faulthandler.enable()
    logs.configure(level=given.log_level, fmt=given.log_format, process="relay")
    openfiles.raise_limit()
    status = 0
    try:
        status = uvloop.run(process.serve(given))
    except CannotStart as error:
        log.error("the relay cannot start", why=str(error))
        status = 1
    logging.shutdown()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    main()
