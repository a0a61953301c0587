"""Envoy's bootstrap configuration, which a pure function makes from frozen settings.

The configuration is static. The sockets of the worker processes are known before Envoy starts, and keep their paths
when a worker is replaced. So no management server (xDS) is needed.

One listener takes HTTP/2 and HTTP/1.1 on one port. Calls with gRPC's content type go to the workers' gRPC sockets as
HTTP/1.1 with trailers. Inference over REST goes to separate sockets, and everything else to the workers' REST sockets.
Envoy rewrites no paths. It adds only the client's address, to requests other than inference, and, if asked to, the
client's certificate. It ends a call only after a long time without progress, because the workers enforce deadlines. It
retries only if a connection could not be made, because then nothing has been sent.

`mesh.envoy.minder` runs and restarts the process.
"""

import itertools
import json
import socket
from dataclasses import dataclass, replace
from typing import Any

from mesh.statuses import Reason

MAX_SOCKET_PATH = 100  # bytes; the kernel's limit is 107, and Envoy refuses without saying which path

_TYPE = "type.googleapis.com/envoy.extensions."
_HTTP_OPTIONS = _TYPE + "upstreams.http.v3.HttpProtocolOptions"

_MAX_FRAME_SIZE = 5  # SETTINGS_MAX_FRAME_SIZE (RFC 9113, 6.5.2), for which Envoy has no field

GRPC_CLUSTER = "grpc"
INFERENCE_CLUSTER = "inference"
REST_CLUSTER = "rest"
MANAGED_GRPC_CLUSTER, MANAGED_REST_CLUSTER = "managed-grpc", "managed-rest"
STAT_PREFIX = "edge"
_CERTIFICATE, _CLIENT_CA = "edge-certificate", "client-authority"


@dataclass(frozen=True, slots=True, kw_only=True)
class Tls:
    """TLS at the listener. The files are in PEM, and `certificates` decides when Envoy gets their content."""

    certificate: str
    private_key: str
    client_ca: str = ""  # set: certificates of clients must be signed by it
    client_optional: bool = False  # clients may come without one
    client_shown: bool = False  # requests tell the workers the client's certificate


@dataclass(frozen=True, slots=True, kw_only=True)
class Door:
    """A second listener, whose calls go to sockets of its own, except those of V2 inference over REST."""

    host: str
    port: int
    grpc_sockets: tuple[str, ...]
    rest_sockets: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class EnvoySettings:
    """The listener, the destinations of its calls, and its bounds. Times are in seconds."""

    host: str
    port: int  # 0: any free one
    admin_socket: str
    grpc_sockets: tuple[str, ...]  # one for each worker
    inference_sockets: tuple[str, ...]  # V2 inference over REST
    rest_sockets: tuple[str, ...]  # everything else over REST
    management: Door | None = None
    tls: Tls | None = None
    secrets_dir: str = ""  # with `tls`: where the files of `secrets` are
    concurrency: int = 1  # threads of Envoy's own

    max_connections: int = 20_000  # of clients
    max_calls: int = 60_000  # in flight, and so the connections to workers
    max_streams: int = 1024  # calls at once on one HTTP/2 connection; a client library opens one connection for all
    max_headers_kb: int = 64
    stream_window: int = 1 << 20  # bytes; HTTP/2's default of 64 KiB makes a large tensor wait for a round trip each
    connection_window: int = 8 << 20
    frame: int = 256 * 1024  # bytes of an HTTP/2 frame that clients may send: 16 of them for 4 MB, by default 256
    connection_buffer: int = 256 * 1024  # bytes, soft, each way; 1 MiB moves 4 MB bodies no faster
    heap: int = 0  # bytes; near them large streams are reset and new connections refused; 0: unbounded

    unread_timeout: float = 30.0  # for a client to take some of the bytes sent to it

    connect_timeout: float = 1.0
    headers_timeout: float = 30.0  # for a request's headers to arrive
    idle_timeout: float = 3600.0  # of a client's connection without calls
    stream_idle_timeout: float = 3600.0  # of a call without any progress: longer than any cold start
    upstream_idle_timeout: float = 30.0  # of a connection to a worker; below that of its REST, else calls race its end
    max_connection_age: float = 0.0  # 0: no limit
    age_spread: float = 0.2  # random extra share of the age, so that connections do not end together
    keepalive: float = 60.0  # between HTTP/2 pings to a client that is silent: how a vanished one is noticed; 0: none


def fit(settings: EnvoySettings, files: int) -> EnvoySettings:
    """Returns settings whose bounds fit the limit on open files: a third for connections of clients, the rest for calls
    to workers.

    An Envoy that reaches the limit on open files can neither accept nor open connections. An Envoy that reaches its own
    bounds answers that it is overloaded.
    """
    usable = max(files - 200, 30)  # its libraries, logs, threads, the admin socket
    return replace(
        settings,
        max_connections=min(settings.max_connections, usable // 3),
        max_calls=min(settings.max_calls, usable - usable // 3),
    )


def bootstrap(settings: EnvoySettings) -> dict[str, Any]:
    """Returns Envoy's bootstrap configuration. Raises ValueError if the settings cannot work."""
    workers = {
        GRPC_CLUSTER: settings.grpc_sockets,
        INFERENCE_CLUSTER: settings.inference_sockets,
        REST_CLUSTER: settings.rest_sockets,
    }
    listeners = [_listener(settings)]
    if (door := settings.management) is not None:
        workers |= {MANAGED_GRPC_CLUSTER: door.grpc_sockets, MANAGED_REST_CLUSTER: door.rest_sockets}
        listeners.append(_listener(settings, door))
    if not all(workers.values()):
        raise ValueError("the edge has no worker to forward calls to: start at least one worker")
    for path in (settings.admin_socket, *itertools.chain.from_iterable(workers.values())):
        if len(path.encode()) >= MAX_SOCKET_PATH:
            raise ValueError(
                f"the socket path {path} has {len(path.encode())} bytes, and at most {MAX_SOCKET_PATH - 1} work: "
                "use a shorter run directory"
            )
    config: dict[str, Any] = {
        "node": {"id": "mesh", "cluster": "mesh"},  # Envoy watches certificates only if its node has a name
        # Private to this user; never on a port.
        "admin": {"address": {"pipe": {"path": settings.admin_socket, "mode": 0o600}}},
        "static_resources": {
            "listeners": listeners,
            "clusters": [
                _cluster(name, paths, settings, trailers=name in (GRPC_CLUSTER, MANAGED_GRPC_CLUSTER))
                for name, paths in workers.items()
            ],
        },
        "overload_manager": _overload(settings),
        # No lookups, no metadata servers: all addresses here are sockets and IP addresses.
        "layered_runtime": {"layers": [{"name": "static", "static_layer": {}}]},
    }
    return config


def encode(settings: EnvoySettings) -> bytes:
    """Returns the bootstrap configuration as JSON. Raises ValueError."""
    return json.dumps(bootstrap(settings), indent=1).encode()


def secrets(certificate: bytes, private_key: bytes, client_ca: bytes) -> dict[str, bytes]:
    """Returns the contents of the files of `secrets_dir`, by name. Each file has one secret. Envoy reads a file again
    when a rename replaces it, and keeps existing connections. Raises ValueError for PEM that is not ASCII."""
    found: dict[str, dict[str, Any]] = {
        _CERTIFICATE: {
            "tls_certificate": {
                "certificate_chain": {"inline_string": certificate.decode("ascii")},
                "private_key": {"inline_string": private_key.decode("ascii")},
            }
        }
    }
    if client_ca:
        found[_CLIENT_CA] = {"validation_context": {"trusted_ca": {"inline_string": client_ca.decode("ascii")}}}
    kind = _TYPE + "transport_sockets.tls.v3.Secret"
    return {
        f"{name}.json": json.dumps({"resources": [{"@type": kind, "name": name, **secret}]}).encode()
        for name, secret in found.items()
    }


def _listener(settings: EnvoySettings, door: Door | None = None) -> dict[str, Any]:
    chain: dict[str, Any] = {
        "filters": [{"name": "envoy.filters.network.http_connection_manager", "typed_config": _manager(settings, door)}]
    }
    where = door or settings
    if settings.tls is not None:
        chain["transport_socket"] = _tls(settings.tls, settings.secrets_dir)
    return {
        "name": "edge" if door is None else "management",
        "address": {"socket_address": {"address": where.host, "port_value": where.port}},
        "per_connection_buffer_limit_bytes": settings.connection_buffer,
        # A client that takes none of the bytes sent to it is gone, or occupies memory for nothing: the kernel ends its
        # connection. Connections inherit this option from the socket that accepts them.
        "socket_options": [
            {
                "description": "TCP_USER_TIMEOUT",
                "level": socket.IPPROTO_TCP,
                "name": socket.TCP_USER_TIMEOUT,
                "int_value": int(settings.unread_timeout * 1000),
            }
        ],
        "filter_chains": [chain],
        # One process for each port: with SO_REUSEPORT (Envoy's default) a second mesh would silently share the port.
        # Envoy's own threads then accept from one socket and are balanced explicitly.
        "enable_reuse_port": False,
        "connection_balance_config": {"exact_balance": {}},
    }


def _manager(settings: EnvoySettings, door: Door | None = None) -> dict[str, Any]:
    grpc, rest = (GRPC_CLUSTER, REST_CLUSTER) if door is None else (MANAGED_GRPC_CLUSTER, MANAGED_REST_CLUSTER)
    common: dict[str, Any] = {
        "idle_timeout": _seconds(settings.idle_timeout),
        "headers_with_underscores_action": "ALLOW",
        "max_headers_count": 200,
    }
    if settings.max_connection_age:
        common["max_connection_duration"] = _seconds(settings.max_connection_age)
        common["max_connection_duration_jitter"] = {"value": 100 * settings.age_spread}  # Envoy 1.39
    http2: dict[str, Any] = {
        "max_concurrent_streams": settings.max_streams,
        "initial_stream_window_size": settings.stream_window,
        "initial_connection_window_size": settings.connection_window,
        "custom_settings_parameters": [{"identifier": _MAX_FRAME_SIZE, "value": settings.frame}],
    }
    shown: dict[str, Any] = {}
    if settings.tls is not None and settings.tls.client_ca and settings.tls.client_shown:
        # Otherwise Envoy only removes the header, which is its default.
        shown = {"forward_client_cert_details": "SANITIZE_SET", "set_current_client_cert_details": {"cert": True}}
    if settings.keepalive:
        http2["connection_keepalive"] = {"interval": _seconds(settings.keepalive), "timeout": "20s"}
    return {
        "@type": _TYPE + "filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": STAT_PREFIX,
        "codec_type": "AUTO",
        "http_protocol_options": _http1(),
        "http2_protocol_options": http2,
        "common_http_protocol_options": common,
        "max_request_headers_kb": settings.max_headers_kb,
        "request_headers_timeout": _seconds(settings.headers_timeout),
        "stream_idle_timeout": _seconds(settings.stream_idle_timeout),
        # Bounds a complete reply that an HTTP/2 client does not accept while its connection is busy otherwise.
        "stream_flush_timeout": _seconds(settings.unread_timeout),
        "drain_timeout": "1s",
        # Calls pass unchanged: no request ids, no forwarded-for, no server header, no rewritten paths (an id may hold
        # %2F, // or ..).
        "generate_request_id": False,
        "preserve_external_request_id": True,
        "use_remote_address": True,
        # No client may change Envoy's behaviour by x-envoy- headers, not even one on this machine: the only internal
        # address is one that no host has (an empty list would mean all private addresses).
        "internal_address_config": {"cidr_ranges": [{"address_prefix": "192.0.2.1", "prefix_len": 32}]},
        "skip_xff_append": True,
        **shown,
        "server_header_transformation": "PASS_THROUGH",
        "normalize_path": False,
        "merge_slashes": False,
        "path_with_escaped_slashes_action": "KEEP_UNCHANGED",
        "local_reply_config": _local_replies(),
        "route_config": {
            "name": "edge",
            "virtual_hosts": [
                {
                    "name": "all",
                    "domains": ["*"],
                    "request_headers_to_remove": ["x-forwarded-proto", "x-envoy-external-address"],
                    "routes": [
                        # content-type application/grpc, or with +proto and the like
                        *(_route(grpc, {"prefix": prefix, "grpc": {}}) | _PEER for prefix in _MANAGEMENT),
                        _route(grpc, {"prefix": "/", "grpc": {}}),
                        _route(INFERENCE_CLUSTER, {"prefix": "/v2/models/", "headers": [_POST]}),
                        _route(rest, {"prefix": "/"}) | _PEER,
                    ],
                }
            ],
        },
        "http_filters": [
            {
                "name": "envoy.filters.http.router",
                "typed_config": {
                    "@type": _TYPE + "filters.http.router.v3.Router",
                    "suppress_envoy_headers": True,
                    "dynamic_stats": False,  # a few of them per call; the workers count calls
                },
            }
        ],
    }


def _http1() -> dict[str, Any]:
    """Returns Envoy's HTTP/1 options, which accept old clients, and clients that offer an upgrade to a protocol that
    the mesh does not support."""
    return {
        "enable_trailers": True,
        # nginx's proxy_pass and ab use HTTP/1.0 by default; its requests may lack a Host.
        "accept_http_10": True,
        "default_host_for_http_10": "mesh",
        # An offer to upgrade may be ignored (RFC 9110, 7.8); Envoy answers it with 403 otherwise. Apache's HttpClient
        # offers TLS/1.2 with every request, others h2c or websocket.
        "ignore_http_11_upgrade": [{"safe_regex": {"regex": ".*"}}],
    }


_MANAGEMENT = ("/mmesh.ModelMesh/", "/com.ibm.watson.tas.proto.TasRuntime/")

# The client's address, for the audit trail. Calls to models do not get it: their heads would differ by client, and the
# workers would have to parse each.
_PEER = {
    "request_headers_to_add": [
        {
            "header": {"key": "mesh-peer", "value": "%DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT%"},
            "append_action": "OVERWRITE_IF_EXISTS_OR_ADD",
        }
    ]
}

_POST = {"name": ":method", "string_match": {"exact": "POST"}}


def _route(cluster: str, match: dict[str, Any]) -> dict[str, Any]:
    return {
        "match": match,
        "route": {
            "cluster": cluster,
            "timeout": "0s",
            # A worker that is being replaced refuses connections at once; then nothing was sent, and any other worker
            # can serve the call. Later failures are left to the worker to judge.
            "retry_policy": {
                "retry_on": "connect-failure",
                "num_retries": 3,
                "retry_host_predicate": [
                    {
                        "name": "envoy.retry_host_predicates.previous_hosts",
                        "typed_config": {"@type": _TYPE + "retry.host.previous_hosts.v3.PreviousHostsPredicate"},
                    }
                ],
                "host_selection_retry_max_attempts": 5,
                "retry_back_off": {"base_interval": "0.005s", "max_interval": "0.1s"},
            },
        },
    }


def _cluster(name: str, sockets: tuple[str, ...], settings: EnvoySettings, *, trailers: bool) -> dict[str, Any]:
    bound = settings.max_calls
    return {
        "name": name,
        "type": "STATIC",
        "connect_timeout": _seconds(settings.connect_timeout),
        "lb_policy": "LEAST_REQUEST",
        "per_connection_buffer_limit_bytes": settings.connection_buffer,
        # Envoy's defaults are 1,024 (3 for retries): HTTP/1.1 needs a connection for each call in flight.
        "circuit_breakers": {
            "thresholds": [
                {
                    "max_connections": bound,
                    "max_pending_requests": bound,
                    "max_requests": bound,
                    "max_retries": bound,
                }
            ]
        },
        "typed_extension_protocol_options": {
            "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
                "@type": _HTTP_OPTIONS,
                "common_http_protocol_options": {
                    "idle_timeout": _seconds(settings.upstream_idle_timeout),
                    "max_headers_count": 200,
                },
                "explicit_http_config": {"http_protocol_options": {"enable_trailers": trailers}},
            }
        },
        "load_assignment": {
            "cluster_name": name,
            "endpoints": [{"lb_endpoints": [{"endpoint": {"address": {"pipe": {"path": path}}}} for path in sockets]}],
        },
    }


def _local_replies() -> dict[str, Any]:
    """Returns the format of the answers that Envoy itself makes, such as for headers that are too large. Over REST the
    format is that of the workers' answers.

    A filter excludes gRPC calls, for which Envoy turns its answer into a status. With this format, the status's message
    would be JSON.
    """
    not_grpc = {
        "header_filter": {
            "header": {
                "name": "content-type",
                "string_match": {"prefix": "application/grpc"},
                "treat_missing_header_as_empty": True,
                "invert_match": True,
            }
        }
    }
    mappers = []
    for name, least, reason in (
        ("5xx", 500, Reason.UNAVAILABLE),
        ("431", 431, Reason.TOO_LARGE),
        ("4xx", 400, Reason.BAD_REQUEST),
    ):
        status = {"comparison": {"op": "GE", "value": {"default_value": least, "runtime_key": f"edge.reply.{name}"}}}
        mappers.append(
            {
                "filter": {"and_filter": {"filters": [not_grpc, {"status_code_filter": status}]}},
                "body_format_override": {
                    "json_format": {
                        "error": "the edge answers: %LOCAL_REPLY_BODY%",
                        "reason": reason.name,
                        "code": int(reason.code),
                        "details": {"flags": "%RESPONSE_FLAGS_LONG%"},
                    },
                    "content_type": "application/json",
                },
            }
        )
    return {"mappers": mappers}


def _overload(settings: EnvoySettings) -> dict[str, Any]:
    monitors: list[dict[str, Any]] = [
        {
            "name": "envoy.resource_monitors.global_downstream_max_connections",
            "typed_config": {
                "@type": _TYPE + "resource_monitors.downstream_connections.v3.DownstreamConnectionsConfig",
                "max_active_downstream_connections": settings.max_connections,
            },
        }
    ]
    overload: dict[str, Any] = {"refresh_interval": "0.25s", "resource_monitors": monitors}
    if settings.heap:
        monitors.append(
            {
                "name": "envoy.resource_monitors.fixed_heap",
                "typed_config": {
                    "@type": _TYPE + "resource_monitors.fixed_heap.v3.FixedHeapConfig",
                    "max_heap_size_bytes": settings.heap,
                },
            }
        )
        overload["buffer_factory_config"] = {"minimum_account_to_track_power_of_two": 18}  # streams from 256 KiB
        overload["actions"] = [
            _heap_action("envoy.overload_actions.shrink_heap", 0.5),
            {
                "name": "envoy.overload_actions.reset_high_memory_stream",
                "triggers": [
                    {
                        "name": "envoy.resource_monitors.fixed_heap",
                        "scaled": {"scaling_threshold": 0.75, "saturation_threshold": 0.9},
                    }
                ],
            },
            # Existing connections stay: their clients are not refused because of others.
            _heap_action("envoy.overload_actions.reject_incoming_connections", 0.85),
            _heap_action("envoy.overload_actions.stop_accepting_requests", 0.97),
        ]
    return overload


def _heap_action(name: str, at: float) -> dict[str, Any]:
    trigger = {"name": "envoy.resource_monitors.fixed_heap", "threshold": {"value": at}}
    return {"name": name, "triggers": [trigger]}


def _tls(tls: Tls, folder: str) -> dict[str, Any]:
    context: dict[str, Any] = {
        "alpn_protocols": ["h2", "http/1.1"],
        "tls_params": {"tls_minimum_protocol_version": "TLSv1_2"},
        "tls_certificate_sds_secret_configs": [_secret(_CERTIFICATE, folder)],
    }
    downstream: dict[str, Any] = {
        "@type": _TYPE + "transport_sockets.tls.v3.DownstreamTlsContext",
        "common_tls_context": context,
    }
    if tls.client_ca:
        context["validation_context_sds_secret_config"] = _secret(_CLIENT_CA, folder)
        # A certificate that is not required is still verified if shown.
        downstream["require_client_certificate"] = not tls.client_optional
    return {"name": "envoy.transport_sockets.tls", "typed_config": downstream}


def _secret(name: str, folder: str) -> dict[str, Any]:
    source = {"path_config_source": {"path": f"{folder}/{name}.json"}, "resource_api_version": "V3"}
    return {"name": name, "sds_config": source}


def _seconds(value: float) -> str:
    return f"{value:.3f}s"
