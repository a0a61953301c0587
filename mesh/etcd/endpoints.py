"""The gRPC channels to etcd's members, and the choice among them.

All requests go to one member until a request fails, and then to the next member. gRPC itself could rotate among several
addresses of one target, but it would compare the names in the members' certificates with that target, and fail. A
failed request switches away only from the member that it was sent to, so that a hundred requests which fail together
switch only once.

A channel keeps the certificate that it was created with, so other certificates need other `Endpoints` (`access`).
"""

import asyncio
import ssl
from pathlib import Path
from urllib.parse import urlsplit

import grpc

from mesh.identity.credentials import load_chain, reason
from mesh.options.etcdsettings import EtcdSettings
from mesh.pb import etcd_pb2_grpc

# Measured with a black-holed connection: keep-alive alone noticed after 60 s, with the ping time-out and without
# bandwidth probes (whose pings count as life signs) after 13 s. Pings only while calls or streams are open: etcd
# answers others with GOAWAY "too many pings" after 40 s.
_OPTIONS = (
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 3_000),
    ("grpc.http2.ping_timeout_ms", 3_000),
    ("grpc.http2.bdp_probe", 0),
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    # A member's pod that is replaced gets another address, and gRPC looks names up again no sooner than after 30 s.
    ("grpc.dns_min_time_between_resolutions_ms", 1_000),
    ("grpc.max_receive_message_length", 16 * 2**20),
    ("grpc.use_local_subchannel_pool", 1),  # a client's channels are its own, so closing it closes no others
    (
        "grpc.enable_http_proxy",
        0,
    ),  # etcd is in the cluster: through a proxy from the environment it could not be reached
)


class Member:
    """A member's endpoint, with its channel and the stubs on it."""

    __slots__ = ("auth", "channel", "cluster", "endpoint", "kv", "lease", "maintenance", "watch")

    def __init__(self, endpoint: str, settings: EtcdSettings) -> None:
        self.endpoint = endpoint
        secure, target = parse_endpoint(endpoint)
        # gRPC defines the *minimum* back-off as the time that one connection attempt may take.
        backoff = ("grpc.min_reconnect_backoff_ms", int(settings.connect_timeout * 1000))
        options: tuple[tuple[str, str | int], ...] = (*_OPTIONS, backoff)
        if secure:
            credentials = grpc.ssl_channel_credentials(
                settings.ca or _system_trust(), settings.private_key, settings.certificate
            )
            if settings.server_name:
                options = (*options, ("grpc.ssl_target_name_override", settings.server_name))
            self.channel = grpc.aio.secure_channel(target, credentials, options)
        else:
            self.channel = grpc.aio.insecure_channel(target, options)
        self.kv = etcd_pb2_grpc.KVStub(self.channel)
        self.watch = etcd_pb2_grpc.WatchStub(self.channel)
        self.lease = etcd_pb2_grpc.LeaseStub(self.channel)
        self.auth = etcd_pb2_grpc.AuthStub(self.channel)
        self.cluster = etcd_pb2_grpc.ClusterStub(self.channel)
        self.maintenance = etcd_pb2_grpc.MaintenanceStub(self.channel)


class Endpoints:
    """The members of an etcd cluster. Connections are made when they are first needed, and then belong to one event
    loop."""

    def __init__(self, settings: EtcdSettings) -> None:
        check(settings)
        self._settings = settings
        self._members: list[Member | None] = [None] * len(settings.endpoints)
        self._index = 0
        self.rotations = 0  # times a member was left

    def __len__(self) -> int:
        return len(self._members)

    @property
    def endpoint(self) -> str:
        """The endpoint of the member in use."""
        return self._settings.endpoints[self._index]

    @property
    def current(self) -> Member:
        """The member to use now."""
        member = self._members[self._index]
        if member is None:
            member = Member(self.endpoint, self._settings)
            self._members[self._index] = member
        return member

    def leave(self, member: Member) -> None:
        """Switches to the next member, if `member` is still in use."""
        if self._members[self._index] is member:
            self._index = (self._index + 1) % len(self._members)
            self.rotations += 1

    async def close(self, grace: float | None) -> None:
        """Closes every channel. Cancels the calls that are still running after `grace` seconds."""
        await asyncio.gather(*(member.channel.close(grace) for member in self._members if member is not None))


def parse_endpoint(endpoint: str) -> tuple[bool, str]:
    """Parses `http://HOST:PORT` or `https://HOST:PORT`. Returns whether the endpoint uses TLS, and the target for gRPC.
    Raises ValueError, whose text contains no password."""
    if "@" in endpoint:
        raise ValueError(
            "an etcd endpoint contains a user name or password: write http://HOST:PORT or https://HOST:PORT, and give "
            "user and password by their own options or fields"
        )
    try:
        parts = urlsplit(endpoint)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise ValueError(
            f"{endpoint!r} is not an etcd endpoint: write http://HOST:PORT or https://HOST:PORT"
        ) from error
    if parts.scheme not in ("http", "https") or not host or parts.path.strip("/") or parts.query:
        raise ValueError(f"{endpoint!r} is not an etcd endpoint: write http://HOST:PORT or https://HOST:PORT")
    return parts.scheme == "https", f"{f'[{host}]' if ':' in host else host}:{port or 2379}"


def check(settings: EtcdSettings) -> None:
    """Raises ValueError for settings with which gRPC would never connect and would give no reason."""
    if not settings.endpoints:
        raise ValueError("no etcd endpoint is given: write http://HOST:PORT or https://HOST:PORT")
    for endpoint in settings.endpoints:
        parse_endpoint(endpoint)
    if (settings.certificate is None) != (settings.private_key is None):
        raise ValueError(
            "a client certificate for etcd needs its private key, and a private key its certificate: "
            "give both or neither"
        )
    if settings.ca is not None:
        try:
            ssl.create_default_context(cadata=settings.ca.decode("ascii"))
        except (ssl.SSLError, UnicodeDecodeError) as error:
            raise ValueError(
                f"the certificate authority for etcd is not in PEM ({error}): give certificates as PEM text"
            ) from error
    if settings.certificate is not None and settings.private_key is not None:
        try:
            load_chain(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), settings.certificate + b"\n" + settings.private_key)
        except (ssl.SSLError, ValueError) as error:
            raise ValueError(
                f"the client certificate for etcd does not work with its key ({reason(error)}): give a "
                "certificate and the key that belongs to it, both in PEM, the key without a password"
            ) from error


def _system_trust() -> bytes | None:
    """Returns the system's certificate authorities as PEM, or None to use gRPC's own list."""
    paths = ssl.get_default_verify_paths()
    if paths.cafile:
        return Path(paths.cafile).read_bytes()
    if paths.capath:
        found = [path.read_bytes() for path in sorted(Path(paths.capath).glob("*.pem"))]
        return b"\n".join(found) or None
    return None
