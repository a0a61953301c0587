"""Options for the log of a process, shared by routers and runtime pods."""

from dataclasses import dataclass
from typing import Annotated

import typer

from mesh.telemetry import logs


@dataclass(frozen=True, slots=True)
class Logging:
    """Format and level of a process's log."""

    log_format: Annotated[str, typer.Option(envvar="MESH_LOG_FORMAT", help="Format of log lines: text or json.")] = (
        "text"
    )
    log_level: Annotated[
        str, typer.Option(envvar="MESH_LOG_LEVEL", help="Lowest level to log: debug, info, warning or error.")
    ] = "info"

    def configure(self, process: str) -> None:
        """Applies the options to the log of this process, which is named `process`. Raises BadParameter."""
        try:
            logs.configure(level=self.log_level, fmt=self.log_format, process=process)  # type: ignore[arg-type]
        except ValueError as error:
            raise typer.BadParameter(str(error)) from error
