"""The Envoy between a relay and a foreign model server: gRPC over HTTP/1.1 in, real gRPC over HTTP/2 out.

It listens on a unix socket and knows one destination, so its configuration is static. It has no time-outs for calls and
no retries: the relay enforces deadlines, and routers decide which calls may be sent twice. Metadata, trailers, streams
and cancellations pass in both directions. An answer that Envoy itself makes, because it has no connection to the
server, has the header `LOCAL`, so that it is not mistaken for an answer of the server.

If Envoy dies, it is started again. `up` waits until Envoy accepts calls again.
"""

import asyncio
import contextlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mesh import process
from mesh.envoy import config, duties
from mesh.envoy.child import EnvoyChild, EnvoyError
from mesh.options.values import parse_address
from mesh.process.supervisor import ChildLife, Ended, Program, StartFailed, Supervisor
from mesh.process.tasks import Tasks
from mesh.telemetry import logs

log = logs.get(__name__)

ADMIN = "egress-admin"
"""Name of the unix socket of Envoy's admin interface, in the folder that the relay and its agent share."""

LOCAL = b"mesh-egress"
"""The header of answers that Envoy itself makes. Its value says why."""

_TYPE = "type.googleapis.com/envoy.extensions."
_CLUSTER = "server"
_START_TIMEOUT = 20.0  # seconds; 0.1 when measured, but a machine that starts everything at once is slow
_MAX_CALLS = 60_000  # in flight


@dataclass(frozen=True, slots=True, kw_only=True)
class EgressSettings:
    """The two ends of an egress."""

    listen: str  # path of the unix socket for the relay
    admin_socket: str
    server: str  # as gRPC names it: host:port or unix:/path
    concurrency: int = 1  # threads of Envoy's own


def bootstrap(settings: EgressSettings) -> dict[str, Any]:
    """Returns Envoy's bootstrap configuration. Raises ValueError for a socket's path that is too long."""
    for path in (settings.listen, settings.admin_socket, settings.server.removeprefix("unix:")):
        if len(path.encode()) >= config.MAX_SOCKET_PATH:
            raise ValueError(
                f"the socket path {path} has {len(path.encode())} bytes, and at most {config.MAX_SOCKET_PATH - 1} "
                "work: use a shorter one"
            )
    return {
        "admin": {"address": {"pipe": {"path": settings.admin_socket, "mode": 0o600}}},
        "static_resources": {"listeners": [_listener(settings)], "clusters": [_cluster(settings.server)]},
        "overload_manager": {"resource_monitors": [_CONNECTIONS]},
        "layered_runtime": {"layers": [{"name": "static", "static_layer": {}}]},
    }


def _listener(settings: EgressSettings) -> dict[str, Any]:
    authority = "localhost" if settings.server.startswith("unix:") else settings.server
    route = {"cluster": _CLUSTER, "timeout": "0s", "host_rewrite_literal": authority}
    manager = {
        "@type": _TYPE + "filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "egress",
        "codec_type": "HTTP1",
        "http_protocol_options": {"enable_trailers": True},
        "common_http_protocol_options": {
            "idle_timeout": "3600s",  # the relay closes its idle connections
            "headers_with_underscores_action": "ALLOW",
            "max_headers_count": 200,
        },
        "max_request_headers_kb": 64,
        "stream_idle_timeout": "0s",
        "generate_request_id": False,
        "preserve_external_request_id": True,
        "use_remote_address": True,
        "skip_xff_append": True,
        "server_header_transformation": "PASS_THROUGH",
        "normalize_path": False,
        "merge_slashes": False,
        "path_with_escaped_slashes_action": "KEEP_UNCHANGED",
        "local_reply_config": {"mappers": [_LOCAL_REPLY]},
        "route_config": {
            "name": "egress",
            "virtual_hosts": [
                {
                    "name": "all",
                    "domains": ["*"],
                    "request_headers_to_remove": ["x-forwarded-proto", "x-envoy-external-address", "x-envoy-internal"],
                    "routes": [{"match": {"prefix": "/"}, "route": route}],
                }
            ],
        },
        "http_filters": [
            {
                "name": "envoy.filters.http.router",
                "typed_config": {
                    "@type": _TYPE + "filters.http.router.v3.Router",
                    "suppress_envoy_headers": True,
                    "dynamic_stats": False,
                },
            }
        ],
    }
    return {
        "name": "egress",
        "address": {"pipe": {"path": settings.listen, "mode": 0o600}},
        "per_connection_buffer_limit_bytes": 256 * 1024,
        "filter_chains": [
            {"filters": [{"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}]}
        ],
    }


_CONNECTIONS = {
    "name": "envoy.resource_monitors.global_downstream_max_connections",
    "typed_config": {
        "@type": _TYPE + "resource_monitors.downstream_connections.v3.DownstreamConnectionsConfig",
        "max_active_downstream_connections": _MAX_CALLS,
    },
}

_LOCAL_REPLY = {
    "filter": {
        "status_code_filter": {
            "comparison": {"op": "GE", "value": {"default_value": 100, "runtime_key": "egress.reply"}}
        }
    },
    "headers_to_add": [
        {
            "header": {"key": LOCAL.decode(), "value": "%RESPONSE_FLAGS_LONG%"},
            "append_action": "OVERWRITE_IF_EXISTS_OR_ADD",
            "keep_empty_value": True,
        }
    ],
}


def _cluster(server: str) -> dict[str, Any]:
    if server.startswith("unix:"):
        kind, address = "STATIC", _address("pipe", path=server.removeprefix("unix:"))
    else:
        host, port = parse_address(server)
        kind, address = "STRICT_DNS", _address("socket_address", address=host, port_value=port)
    return {
        "name": _CLUSTER,
        "type": kind,
        "connect_timeout": "2s",
        "per_connection_buffer_limit_bytes": 256 * 1024,
        "circuit_breakers": {
            "thresholds": [
                {"max_connections": _MAX_CALLS, "max_pending_requests": _MAX_CALLS, "max_requests": _MAX_CALLS}
            ]
        },
        "typed_extension_protocol_options": {
            "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
                "@type": _TYPE + "upstreams.http.v3.HttpProtocolOptions",
                "common_http_protocol_options": {"idle_timeout": "0s", "max_headers_count": 200},
                "explicit_http_config": {
                    "http2_protocol_options": {
                        "initial_stream_window_size": 1 << 20,
                        "initial_connection_window_size": 8 << 20,
                    }
                },
            }
        },
        "load_assignment": {
            "cluster_name": _CLUSTER,
            "endpoints": [{"lb_endpoints": [{"endpoint": {"address": address}}]}],
        },
    }


def _address(kind: str, **parts: str | int) -> dict[str, Any]:
    return {kind: parts}


class EgressMinder:
    """The egress of one relay: one Envoy process and its restarts."""

    def __init__(
        self,
        settings: EgressSettings,
        *,
        run_dir: Path,
        name: str = "egress",
        on_lost: Callable[[str], None] = lambda why: None,
    ) -> None:
        """Makes a minder. `on_lost` gets the reason if the task that restarts Envoy ends."""
        self._settings = settings
        self._child = EnvoyChild(run_dir=run_dir, admin_socket=settings.admin_socket, name=name)
        self._tasks = Tasks(on_lost)
        self._ready = asyncio.Event()
        self._supervisor = Supervisor(
            Program(
                name,
                self._spawn,
                missing=self._child.missing,
                ask=self._child.answers,
                start_timeout=_START_TIMEOUT,
                grace=1.0,
                explain=self._explain,
            ),
            on_ready=self._ready.set,
            on_death=self._died,
        )

    @property
    def pid(self) -> int | None:
        """Envoy's process id, or None if it does not run."""
        return self._supervisor.pid

    async def start(self) -> None:
        """Starts Envoy, and waits until it accepts calls. Raises EnvoyError."""
        try:
            self._child.config_path.write_text(json.dumps(bootstrap(self._settings), indent=1))
            self._child.open()
            await self._supervisor.start()
        except (ValueError, OSError, StartFailed) as error:
            await self.stop()
            raise EnvoyError(str(error)) from error
        self._tasks.run(duties.EGRESS, self._supervisor.run)
        log.info("egress ready", pid=self.pid, server=self._settings.server)

    @property
    def is_up(self) -> bool:
        """True while Envoy accepts calls, as far as is known."""
        return self._ready.is_set()

    async def up(self) -> None:
        """Waits until Envoy accepts calls, without a time limit."""
        await self._ready.wait()

    async def stop(self) -> None:
        """Ends Envoy, and all calls with it."""
        self._child.quiet = True
        self._supervisor.leave()
        await self._tasks.close()
        await self._child.close()
        await self._supervisor.stop(1.0)

    async def _spawn(self, _: ChildLife) -> process.Process:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._settings.listen)  # left by a former process: Envoy would not bind
        return await self._child.spawn(self._settings.concurrency)

    def _explain(self, how: str, lines: tuple[str, ...]) -> str:
        return f"the egress Envoy {how}: {self._child.complained}" if lines else f"the egress Envoy {how}"

    def _died(self, ended: Ended) -> None:
        self._ready.clear()
        log.warning("the egress died, and its calls with it", how=ended.how)
