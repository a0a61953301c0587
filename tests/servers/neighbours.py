"""MLServer as the chart's preset starts it, in a container beside the agent's: here with other ports and folders."""

from pathlib import Path

import yaml

from deploy import manifests
from mesh.process import free_port
from tests.support.localmesh import Program

PRESET = yaml.safe_load((manifests.CHART / "files" / "presets.yaml").read_text())["mlserver"]
SHARED = "/var/lib/mesh/server"


def neighbour(environment: Path, shared: Path, folder: Path, grpc_port: int) -> Program:
    """Returns an MLServer with the command and the variables of the preset, but with other ports and folders."""
    ports = {"8001": str(grpc_port), "8002": str(free_port())}
    variables = {one["name"]: ports.get(one["value"], one["value"]) for one in PRESET["env"]}
    variables |= {"MLSERVER_METRICS_DIR": str(folder / "metrics")}  # by default, a folder where it is started
    variables |= {"HOME": str(folder), "PATH": f"{environment / 'bin'}:/usr/bin:/bin"}
    command = [word.replace(SHARED, str(shared)) for word in PRESET["command"]]
    assert f"{shared}/mlserver_app.py" in command[-1]
    return Program(
        "neighbour", ["env", "-i", *(f"{name}={value}" for name, value in variables.items()), *command], folder
    )
