"""How a process logs: the options that routers and runtime pods share."""

from dataclasses import dataclass
from typing import Annotated

import typer

from mesh.telemetry import logs


@dataclass(frozen=True, slots=True)
class Logging:
    """Form and level of a process's log."""

    log_format: Annotated[str, typer.Option(envvar="MESH_LOG_FORMAT", help="Form of log lines: text or json.")] = "text"
    log_level: Annotated[
        str, typer.Option(envvar="MESH_LOG_LEVEL", help="Least level to log: debug, info, warning or error.")
    ] = "info"

    def configure(self, process: str) -> None:
        """Logs so from now on, as `process`. Raises BadParameter."""
        try:
            logs.configure(level=self.log_level, fmt=self.log_format, process=process)  # type: ignore[arg-type]
        except ValueError as error:
            raise typer.BadParameter(str(error)) from error
