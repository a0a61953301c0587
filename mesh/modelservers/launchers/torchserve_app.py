"""Starts TorchServe from its settings: `python torchserve_app.py SETTINGS.json`, in the Python that has TorchServe.

TorchServe's own command keeps a file with its process id, which allows one TorchServe on a machine. It also reads the
current folder and the variables TS_*. So this program writes the configuration and becomes the Java program itself.

TorchServe's REST ports become unix sockets, which nothing calls. Sockets and temporary files are in the pod's own
folder, because TorchServe numbers them from a fixed number.
"""

import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Any

_LOG = """<?xml version="1.0" encoding="UTF-8"?>
<Configuration status="warn">
  <Appenders>
    <Console name="console" target="SYSTEM_ERR">
      <RegexFilter regex=".*(Backend received inference|s_name_part).*" onMatch="DENY" onMismatch="NEUTRAL"/>
      <PatternLayout pattern="%d{ISO8601} [%-5p] %c - %m%n"/>
    </Console>
  </Appenders>
  <Loggers>
    <Root level="warn"><AppenderRef ref="console"/></Root>
    <Logger name="org.pytorch.serve.ModelServer" level="info"/>
    <Logger name="MODEL_LOG" level="info"/>
    <Logger name="ACCESS_LOG" level="off"/>
    <Logger name="TS_METRICS" level="off"/>
    <Logger name="MODEL_METRICS" level="off"/>
  </Loggers>
</Configuration>
"""


def properties(given: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Returns TorchServe's configuration. `folder` is for its unix sockets."""
    return {
        **{f"{name}_address": f"unix:{folder}/{name}.sock" for name in ("inference", "management", "metrics")},
        "grpc_inference_address": given["host"],
        "grpc_inference_port": given["calls_port"],
        "grpc_management_address": given["host"],
        "grpc_management_port": given["management_port"],
        "model_store": given["models"],
        "allowed_urls": "none://",  # models come from the model store only
        "disable_token_authorization": "true",  # only this pod's processes reach the ports on loopback
        "enable_model_api": "true",
        "disable_system_metrics": "true",
        "install_py_dep_per_model": "false",
        "number_of_gpu": 0,
        "job_queue_size": 1000,
        "max_request_size": 2**31 - 1,  # the router's limit counts
        "max_response_size": 2**31 - 1,
    }


def main() -> None:
    """Replaces this process with the server."""
    given = json.loads(Path(sys.argv[1]).read_text())
    found = importlib.util.find_spec("ts")
    if found is None or not found.submodule_search_locations:
        sys.exit(f"{sys.executable} has no TorchServe")
    package = Path(found.submodule_search_locations[0])
    folder = Path(given["folder"])
    temporary = folder / "tmp"
    temporary.mkdir(parents=True, exist_ok=True)
    settings, log = folder / "config.properties", folder / "log4j2.xml"
    settings.write_text("".join(f"{name}={value}\n" for name, value in properties(given, folder).items()))
    log.write_text(_LOG)
    # LOG_LOCATION and METRICS_LOCATION name folders for log files, of which there are none.
    for name in list(os.environ):
        if name.startswith(("TS_", "LOG_LOCATION", "METRICS_LOCATION")):
            del os.environ[name]
    os.chdir(folder)
    java = str(given["java"])
    argv = [java, "-Xmx1g", "-XX:+UseSerialGC", "-XX:+ExitOnOutOfMemoryError"]
    argv += [f"-Dmodel_server_home={package.parent}", f"-Djava.io.tmpdir={temporary}"]
    argv += [f"-Dlog4j.configurationFile=file://{log}", "-cp", f"{package}/frontend/*", "org.pytorch.serve.ModelServer"]
    argv += ["--python", sys.executable, "-f", str(settings), "-s", str(given["models"]), "-ncs"]
    os.execv(java, argv)


if __name__ == "__main__":
    main()
