"""An nginx in front of a mesh, with the configuration from docs/clients.md."""

import os
import re
from pathlib import Path

from mesh.process import free_port
from tests.support.localmesh import LocalMesh, Program
from tests.support.waiting import until

DOCS = Path(__file__).parents[2] / "docs" / "clients.md"

_AROUND = """
daemon off;
{user}
pid {folder}/pid;
worker_processes 1;
events {{ worker_connections 512; }}
http {{
    access_log off;
    client_body_temp_path {folder}/bodies;
    proxy_temp_path {folder}/proxied;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    gzip on;
    gzip_types application/json;
    {servers}
}}
"""


class Nginx:
    """A running nginx: `async with Nginx(mesh, folder) as nginx`. Its addresses `rest` and `grpc` can be used like
    those of a mesh."""

    def __init__(self, mesh: LocalMesh, folder: Path) -> None:
        folder.mkdir()
        ports = {"80": free_port(), "81": free_port()}
        self.rest, self.grpc = (f"127.0.0.1:{port}" for port in ports.values())
        servers = re.search(r"```nginx\n(.*?)```", DOCS.read_text(), re.DOTALL)
        assert servers is not None
        shown = servers[1].replace("grpc://127.0.0.1:8033", f"grpc://{mesh.grpc_address()}")
        shown = shown.replace("http://127.0.0.1:8033", mesh.rest_url())
        shown = re.sub(r"listen (\d+)", lambda found: f"listen 127.0.0.1:{ports[found[1]]}", shown)
        user = "user root;" if os.geteuid() == 0 else ""  # nginx's workers write where only the test's user may
        configuration = folder / "nginx.conf"
        configuration.write_text(_AROUND.format(folder=folder, servers=shown, user=user))
        self._program = Program("nginx", ["nginx", "-c", str(configuration), "-e", str(folder / "errors")], folder)
        self._pid = folder / "pid"

    async def __aenter__(self) -> "Nginx":
        self._program.start()
        await until(self._pid.exists, why=self._program.tail)  # nginx listens before it writes its pid
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._program.stop()
