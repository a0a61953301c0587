"""A stand-in for OpenVINO Model Server, which no package registry has: a process that follows OVMS's documentation.

It reads a configuration file at its start and when `POST /v1/config/reload` says so, and answers with the states of all
models, or with an error if one cannot be loaded. It answers V2 over gRPC. A model's answer is the number in its file
(`*.bin`, else `*.onnx`) times each input, so that answers show which files were loaded. Files with the content `broken`
cannot be loaded. Like OVMS, it does not start without the file, and ignores new files below a path that it knows.

Run as `python -m tests.support.fakeovms --port P --rest_port R --config_path FILE`.
"""

import argparse
import json
import threading
from concurrent import futures
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from mesh.pb import inference_pb2 as v2
from mesh.pb import inference_pb2_grpc


class Models:
    """The models of the server, as its configuration file lists them."""

    def __init__(self, config: Path) -> None:
        self._config = config
        self._lock = threading.Lock()
        self.paths: dict[str, str] = {}
        self.states: dict[str, dict[str, Any]] = {}
        self.factors: dict[str, float] = {}
        self.reloads = 0

    def read(self) -> str:
        """Reads the configuration file. Returns an error, or "" if there is none."""
        with self._lock:
            self.reloads += 1
            try:
                listed = json.loads(self._config.read_bytes())["model_config_list"]
                wanted = {one["config"]["name"]: one["config"]["base_path"] for one in listed}
            except (OSError, ValueError, KeyError) as error:
                return f"Config file is not valid: {error!r}"
            for name in [name for name, path in self.paths.items() if wanted.get(name) != path]:
                for known in (self.paths, self.states, self.factors):
                    known.pop(name, None)
            for name, path in wanted.items():
                if name not in self.factors:
                    self._load(name, Path(path))
            failed = [name for name in wanted if name not in self.factors]
            return f"Reloading models versions failed: {failed}" if failed else ""

    def _load(self, name: str, base: Path) -> None:
        self.paths[name] = str(base)
        versions = sorted((one for one in base.iterdir() if one.name.isdigit()), key=lambda one: int(one.name))
        if not versions:
            self.states[name] = {"model_version_status": []}
            return
        version = versions[-1]
        files = [*version.glob("*.bin"), *version.glob("*.onnx")]
        state, code, text = "AVAILABLE", "OK", "OK"
        try:
            self.factors[name] = float(files[0].read_text())
        except (IndexError, ValueError, OSError) as error:
            state, code, text = "LOADING", "UNKNOWN", f"{version}: {error}"
        status = {"error_code": code, "error_message": text}
        self.states[name] = {"model_version_status": [{"version": version.name, "state": state, "status": status}]}


def rest(models: Models) -> type[BaseHTTPRequestHandler]:
    class Rest(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer(200 if self.path == "/v1/config" else 404, models.states)

        def do_POST(self) -> None:
            if self.path != "/v1/config/reload":
                self._answer(404, {"error": "Invalid request URL"})
                return
            error = models.read()
            self._answer(412 if error else 201, {"error": error} if error else models.states)

        def _answer(self, status: int, body: object) -> None:
            text = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *_: object) -> None:
            """Logs nothing."""

    return Rest


class V2(inference_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]
    def __init__(self, models: Models) -> None:
        self._models = models

    def ServerMetadata(self, request: Any, context: Any) -> Any:
        """Answers with the server's name and, in place of a version, the number of reloads."""
        return v2.ServerMetadataResponse(name="OpenVINO Model Server", version=str(self._models.reloads))

    def ModelReady(self, request: Any, context: Any) -> Any:
        if request.name not in self._models.paths:
            context.abort(grpc.StatusCode.NOT_FOUND, "Model with requested name is not found")
        return v2.ModelReadyResponse(ready=request.name in self._models.factors)

    def ModelInfer(self, request: Any, context: Any) -> Any:
        """Multiplies the only input by the model's number."""
        factor = self._models.factors.get(request.model_name)
        if factor is None:
            context.abort(grpc.StatusCode.NOT_FOUND, "Model with requested name is not found")
        (given,) = request.inputs
        values = np.frombuffer(request.raw_input_contents[0], "<f4") * np.float32(factor or 0)
        answer = v2.ModelInferResponse(model_name=request.model_name, raw_output_contents=[values.tobytes()])
        answer.outputs.add(name="y", datatype="FP32", shape=given.shape)
        return answer


def main() -> None:
    """Serves until the process is killed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--rest_port", type=int, required=True)
    parser.add_argument("--config_path", type=Path, required=True)
    parser.add_argument("--file_system_poll_wait_seconds", type=int, default=1)  # it never polls
    given = parser.parse_args()
    models = Models(given.config_path)
    if not given.config_path.is_file():
        raise SystemExit(f"{given.config_path} is not a file")
    models.read()
    server = grpc.server(futures.ThreadPoolExecutor(8))
    inference_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(V2(models), server)
    web = ThreadingHTTPServer(("127.0.0.1", given.rest_port), rest(models))
    server.add_insecure_port(f"127.0.0.1:{given.port}")
    server.start()
    web.serve_forever()


if __name__ == "__main__":
    main()
