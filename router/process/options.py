"""The groups of options that `python -m router` takes, and the checks that need several of them."""

import ipaddress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from mesh.options import checked, tls, values
from mesh.tokens import places
from mesh.tokens.settings import ALGORITHMS, KUBERNETES, TokenSettings
from router.access import adminkeys
from router.access import audit as audits
from router.access.guard import MODES

_BODY_BYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class Edge:
    """The options for the addresses, TLS and program of the edge."""

    listen: Annotated[str, typer.Option(envvar="MESH_LISTEN", help="Address that clients call, HOST:PORT.")] = (
        "127.0.0.1:8033"
    )
    edge: Annotated[
        str,
        typer.Option(
            envvar="MESH_EDGE",
            help="Program that accepts clients' connections: envoy, or grpc (grpc.aio) where Envoy cannot run.",
        ),
    ] = "envoy"
    rest_listen: Annotated[
        str,
        typer.Option(envvar="MESH_REST_LISTEN", help="Address that REST clients call, HOST:PORT, with --edge grpc."),
    ] = "127.0.0.1:8008"
    management_listen: Annotated[
        str,
        typer.Option(
            envvar="MESH_MANAGEMENT_LISTEN",
            help=(
                "Separate address for management, HOST:PORT, which also serves inference; --listen then serves "
                "inference only. Default: --listen serves both."
            ),
        ),
    ] = ""
    tls_cert: Annotated[
        Path | None,
        typer.Option(
            envvar="MESH_TLS_CERT",
            help="PEM file with the certificate that the router presents to clients; read again when it is replaced.",
        ),
    ] = None
    tls_key: Annotated[
        Path | None, typer.Option(envvar="MESH_TLS_KEY", help="PEM file with the key of --tls-cert.")
    ] = None
    tls_client_ca: Annotated[
        Path | None,
        typer.Option(
            envvar="MESH_TLS_CLIENT_CA",
            help="PEM file with the authorities that sign clients' certificates. See --tls-client-auth.",
        ),
    ] = None
    tls_client_auth: Annotated[
        str,
        typer.Option(
            envvar="MESH_TLS_CLIENT_AUTH",
            metavar="require|optional",
            help="Policy for clients' certificates with --tls-client-ca: require, or optional, which also admits "
            "clients without a certificate.",
            show_default="require",
        ),
    ] = ""
    internal_tls: tls.Internal = None
    connection_age: Annotated[
        float,
        typer.Option(
            envvar="MESH_CONNECTION_AGE",
            min=0.0,
            help="Age of a connection, in seconds, at which its client is asked to reconnect, so that it finds new "
            "routers; up to a fifth is added at random. 0: never.",
        ),
    ] = 0.0
    probe: Annotated[
        str,
        typer.Option(
            envvar="MESH_PROBE", help="Address of the health checks /ready and /live, and of /metrics, HOST:PORT."
        ),
    ] = "127.0.0.1:8089"

    def check(self) -> None:
        """Raises BadParameter for options that are not valid, or that contradict each other."""
        if self.edge not in ("envoy", "grpc"):
            raise typer.BadParameter(f"{self.edge!r} is neither envoy nor grpc", param_hint="--edge")
        if (self.tls_cert is None) != (self.tls_key is None):
            raise typer.BadParameter("give both --tls-cert and --tls-key, or neither", param_hint="--tls-cert")
        if self.tls_client_ca is not None and self.tls_cert is None:
            raise typer.BadParameter("--tls-client-ca needs --tls-cert and --tls-key", param_hint="--tls-client-ca")
        if self.tls_client_auth not in ("", "require", "optional"):
            text = f"{self.tls_client_auth!r} is neither require nor optional"
            raise typer.BadParameter(text, param_hint="--tls-client-auth")
        if self.tls_client_auth and self.tls_client_ca is None:
            text = "--tls-client-auth needs --tls-client-ca"
            raise typer.BadParameter(text, param_hint="--tls-client-auth")
        if self.management_listen and self.edge == "grpc":
            raise typer.BadParameter("it needs Envoy: use --edge envoy", param_hint="--management-listen")
        if self.management_listen and self.management_listen == self.listen:
            text = f"{self.listen} is the address of --listen already: choose another"
            raise typer.BadParameter(text, param_hint="--management-listen")
        if self.edge == "grpc" and (self.tls_cert is not None or self.connection_age):
            text = "--tls-cert and --connection-age need Envoy: use --edge envoy, or leave them out"
            raise typer.BadParameter(text, param_hint="--edge")


@dataclass(frozen=True, slots=True)
class AccessControl:
    """The options for access control (docs/security.md)."""

    auth: Annotated[
        str,
        typer.Option(
            envvar="MESH_AUTH",
            metavar="off|management|required",
            help="Kind of requests that need an API key, token or client certificate: none, those of management, or "
            "all.",
        ),
    ] = "off"
    admin_key_file: Annotated[
        Path | None,
        typer.Option(
            envvar="MESH_ADMIN_KEY_FILE",
            help="File with the key of an admin who may do everything; read again when it is replaced.",
        ),
    ] = None

    grants_file: Annotated[
        Path | None,
        typer.Option(
            envvar="MESH_GRANTS_FILE",
            help="TOML or JSON file with grants that apply besides those in etcd; read again when it changes.",
        ),
    ] = None

    audit: Annotated[
        str,
        typer.Option(
            envvar="MESH_AUDIT",
            metavar="auto|off|log|FILE",
            help=(
                "Destination of the audit trail: off, log, or a file to append to; auto: log with --auth "
                "management or required, otherwise off."
            ),
        ),
    ] = "auto"

    def trail(self) -> str:
        """Returns the place of the audit trail: off, log, or the absolute path of a file."""
        if self.audit == audits.AUTO:
            return audits.OFF if self.auth == "off" else audits.LOG
        return self.audit if self.audit in (audits.OFF, audits.LOG) else str(Path(self.audit).absolute())

    def check(self) -> None:
        """Raises BadParameter for options that cannot work. Opens the file of the audit trail, and creates it if it is
        missing."""
        try:
            audits.Audit(self.trail()).close()
        except OSError as error:
            text = f"{self.audit} cannot be written: {error.strerror}"
            raise typer.BadParameter(text, param_hint="--audit") from error
        if self.auth not in MODES:
            raise typer.BadParameter(f"{self.auth!r} is none of {', '.join(MODES)}", param_hint="--auth")
        if self.admin_key_file is not None:
            try:
                adminkeys.read(self.admin_key_file)
            except ValueError as error:
                raise typer.BadParameter(str(error), param_hint="--admin-key-file") from error

        if self.grants_file is not None and self.auth == "off":
            text = "grants need --auth management or required, because with off every caller may do everything"
            raise typer.BadParameter(text, param_hint="--grants-file")

    def warning(self, *addresses: str) -> str:
        """Returns a warning if no request needs a key, and other machines can reach one of the `addresses`. Otherwise
        returns ""."""
        open_to = [one for one in addresses if not _is_loopback(one)]
        if self.auth != "off" or not open_to:
            return ""
        return (
            f"anybody who reaches {open_to[0]} may call, register and delete every model: "
            "set --auth (MESH_AUTH) to management or required"
        )


def _is_loopback(address: str) -> bool:
    host, _ = values.parse_address(address)
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


@dataclass(frozen=True, slots=True)
class TokenOptions:
    """The options for issuers of tokens, which are accepted besides API keys (docs/security.md)."""

    auth_jwt_issuer: Annotated[
        str,
        typer.Option(
            envvar="MESH_AUTH_JWT_ISSUER",
            metavar="URL",
            help="OIDC issuer whose tokens are accepted, exactly as in their claim iss.",
        ),
    ] = ""
    auth_jwt_audience: Annotated[
        str,
        typer.Option(
            envvar="MESH_AUTH_JWT_AUDIENCE",
            metavar="NAME,...",
            help="Audiences of accepted tokens: the mesh's names at the issuer, one of which must be in the claim aud.",
        ),
    ] = ""
    auth_jwt_keys: Annotated[
        str,
        typer.Option(
            envvar="MESH_AUTH_JWT_KEYS",
            metavar="FILE|URL",
            help=(
                "Public keys of the issuer (JWKS): a file, read again when it changes, or an https URL, read "
                "every 5 minutes and when a token names an unknown key. Default: the URL in the issuer's "
                "discovery document."
            ),
        ),
    ] = ""
    auth_jwt_ca: Annotated[
        Path | None,
        typer.Option(
            envvar="MESH_AUTH_JWT_CA",
            help="PEM file of the authorities to trust for the issuer's URLs. Default: the system's.",
        ),
    ] = None
    auth_jwt_algorithms: Annotated[
        str,
        typer.Option(
            envvar="MESH_AUTH_JWT_ALGORITHMS",
            metavar="NAME,...",
            help="Algorithms by which accepted tokens may be signed. Default: all with public keys.",
        ),
    ] = ""
    auth_jwt_user_claim: Annotated[
        str,
        typer.Option(
            envvar="MESH_AUTH_JWT_USER_CLAIM",
            help="Claim with the name of the user, who is user:NAME in grants.",
        ),
    ] = "sub"
    auth_jwt_groups_claim: Annotated[
        str,
        typer.Option(
            envvar="MESH_AUTH_JWT_GROUPS_CLAIM",
            help="Claim with the user's groups, which are group:NAME in grants, or a path such as realm_access.roles.",
        ),
    ] = "groups"
    auth_jwt_skew: Annotated[
        float,
        typer.Option(
            envvar="MESH_AUTH_JWT_SKEW",
            min=0.0,
            max=300.0,
            help="Tolerated difference between the clocks of issuer and router, in seconds.",
        ),
    ] = 60.0
    auth_kubernetes: Annotated[
        str,
        typer.Option(
            envvar="MESH_AUTH_KUBERNETES",
            metavar="off|review|keys",
            help="Verification of the tokens of Kubernetes service accounts: none; by the API server (TokenReview), "
            "which notices deleted accounts; or by the cluster's public keys, which needs no rights.",
        ),
    ] = "off"
    auth_kubernetes_audience: Annotated[
        str,
        typer.Option(
            envvar="MESH_AUTH_KUBERNETES_AUDIENCE",
            metavar="NAME,...",
            help=(
                "Audiences of accepted service account tokens (kubectl create token --audience). Empty: the "
                "API server's own audience; anyone who sees such a token can also use it at the API server."
            ),
        ),
    ] = "mesh"
    auth_kubernetes_api: Annotated[
        str, typer.Option(envvar="MESH_AUTH_KUBERNETES_API", hidden=True, help="URL of the Kubernetes API, for tests.")
    ] = ""
    auth_kubernetes_account: Annotated[
        Path | None,
        typer.Option(
            envvar="MESH_AUTH_KUBERNETES_ACCOUNT", hidden=True, help="Folder with token and ca.crt, for tests."
        ),
    ] = None

    def check(self, auth: str) -> None:
        """Raises BadParameter for options that cannot work. `auth` is the value of `--auth`."""
        self._check_issuer()
        if self.auth_kubernetes not in KUBERNETES:
            text = f"{self.auth_kubernetes!r} is none of {', '.join(KUBERNETES)}"
            raise typer.BadParameter(text, param_hint="--auth-kubernetes")
        if auth == "off" and (self.auth_jwt_issuer or self.auth_kubernetes != "off"):
            text = "tokens are only verified with --auth management or --auth required"
            raise typer.BadParameter(text, param_hint="--auth")

    def _check_issuer(self) -> None:
        if not self.auth_jwt_issuer:
            for option, value in (
                ("--auth-jwt-audience", self.auth_jwt_audience),
                ("--auth-jwt-keys", self.auth_jwt_keys),
                ("--auth-jwt-ca", self.auth_jwt_ca),
            ):
                if value:
                    raise typer.BadParameter("name the issuer too, with --auth-jwt-issuer", param_hint=option)
            return
        if not _names(self.auth_jwt_audience):
            text = (
                "name the audience of the mesh's tokens: without it, tokens that the issuer made for any other "
                "application would be accepted here"
            )
            raise typer.BadParameter(text, param_hint="--auth-jwt-audience")
        if unknown := [one for one in _names(self.auth_jwt_algorithms) if one not in ALGORITHMS]:
            text = f"{unknown[0]!r} is none of {', '.join(ALGORITHMS)}"
            raise typer.BadParameter(text, param_hint="--auth-jwt-algorithms")
        if not self.auth_jwt_keys or "://" in self.auth_jwt_keys:
            option = "--auth-jwt-keys" if self.auth_jwt_keys else "--auth-jwt-issuer"
            try:
                places.check(self.auth_jwt_keys or self.auth_jwt_issuer)
            except ValueError as error:
                raise typer.BadParameter(str(error), param_hint=option) from error
        for option, path in (("--auth-jwt-keys", self._keys_file()), ("--auth-jwt-ca", self.auth_jwt_ca)):
            if path is not None and not path.is_file():
                raise typer.BadParameter(f"there is no file {path}", param_hint=option)
        if (file := self._keys_file()) is not None:
            from mesh.tokens import keyset  # with PyJWT, which most meshes do not need

            try:
                keyset.parse(file.read_bytes(), _names(self.auth_jwt_algorithms) or ALGORITHMS)
            except OSError as error:
                text = f"{file} cannot be read: {error.strerror}"
                raise typer.BadParameter(text, param_hint="--auth-jwt-keys") from error
            except ValueError as error:
                raise typer.BadParameter(f"{file} cannot be used: {error}", param_hint="--auth-jwt-keys") from error

    def _keys_file(self) -> Path | None:
        return Path(self.auth_jwt_keys) if self.auth_jwt_keys and "://" not in self.auth_jwt_keys else None

    def settings(self) -> TokenSettings:
        """Returns the settings that the options describe, with absolute paths."""
        file = self._keys_file()
        return TokenSettings(
            issuer=self.auth_jwt_issuer,
            audiences=_names(self.auth_jwt_audience),
            keys=self.auth_jwt_keys if file is None else str(file.absolute()),
            ca=str(self.auth_jwt_ca.absolute()) if self.auth_jwt_ca else "",
            algorithms=_names(self.auth_jwt_algorithms) or ALGORITHMS,
            user_claim=self.auth_jwt_user_claim,
            groups_claim=self.auth_jwt_groups_claim,
            skew=self.auth_jwt_skew,
            kubernetes=self.auth_kubernetes,
            kubernetes_audiences=_names(self.auth_kubernetes_audience),
            kubernetes_api=self.auth_kubernetes_api,
            kubernetes_account=str(self.auth_kubernetes_account.absolute()) if self.auth_kubernetes_account else "",
        )


def _names(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))


@dataclass(frozen=True, slots=True)
class RouterLimits:
    """The options for limits on calls, and on the memory that calls use (docs/limits.md)."""

    max_message: Annotated[
        str, typer.Option(envvar="MESH_MAX_MESSAGE", help="Size of the largest request or reply, in bytes.")
    ] = "16MiB"
    max_forwarded_message: Annotated[
        str,
        typer.Option(
            envvar="MESH_MAX_FORWARDED_MESSAGE",
            help="Size of the largest message that is forwarded in pieces (over 1 MiB, model id in the metadata), in "
            "bytes; 0: no limit.",
        ),
    ] = "0"
    max_body_bytes: Annotated[
        str,
        typer.Option(
            envvar="MESH_MAX_BODY_BYTES",
            help="Bytes of requests and replies that a worker may hold; once half is used, large requests are refused "
            "with 429. auto: 256 MiB, or four times --max-message if that is more.",
        ),
    ] = "auto"
    min_body_rate: Annotated[
        str,
        typer.Option(
            envvar="MESH_MIN_BODY_RATE",
            help="Lowest rate at which a body may arrive or be read after 10 s, in bytes a second; 0: no limit.",
        ),
    ] = "32KiB"
    edge_memory: Annotated[
        str,
        typer.Option(
            envvar="MESH_EDGE_MEMORY",
            help=(
                "Memory that Envoy may use, in bytes; close to the limit, Envoy resets the largest streams and "
                "refuses new connections. 0: no limit."
            ),
        ),
    ] = "384MiB"
    max_connections_per_pod: Annotated[
        int,
        typer.Option(
            envvar="MESH_MAX_CONNECTIONS_PER_POD",
            min=2,
            help=(
                "Number of connections of one worker to one pod, which limits its calls in flight there; each "
                "model gets a share."
            ),
        ),
    ] = 1024
    load_wait: Annotated[
        float,
        typer.Option(envvar="MESH_LOAD_WAIT", min=0.1, help="Longest wait of a caller for a load, in seconds."),
    ] = 120.0
    unload_wait: Annotated[
        float,
        typer.Option(
            envvar="MESH_UNLOAD_WAIT",
            min=0.1,
            help=(
                "Longest wait for pods to unload copies when a model is unregistered or registered again, in seconds."
            ),
        ),
    ] = 10.0
    max_waiters: Annotated[
        int,
        typer.Option(envvar="MESH_MAX_WAITERS", min=1, help="Number of calls of one worker that may wait for loads."),
    ] = 20_000
    max_waiters_per_model: Annotated[
        int,
        typer.Option(
            envvar="MESH_MAX_WAITERS_PER_MODEL",
            min=1,
            help="Number of calls of one worker that may wait for one model.",
        ),
    ] = 2_000
    max_waiting_bytes: Annotated[
        str,
        typer.Option(
            envvar="MESH_MAX_WAITING_BYTES", help=("Total bytes of the calls of one worker that wait for loads.")
        ),
    ] = "256MiB"
    reregister_after: Annotated[
        str,
        typer.Option(
            envvar="MESH_REREGISTER_AFTER",
            metavar="SECONDS|never",
            help="Time after which an id may be registered with other attributes although a pod that is cut off from "
            "etcd may still answer for its earlier registration, in seconds; 'never': only once no pod may answer.",
        ),
    ] = "600"
    drain_timeout: Annotated[
        float,
        typer.Option(
            envvar="MESH_DRAIN_TIMEOUT", min=0.0, help="Time for calls in flight to end after SIGTERM, in seconds."
        ),
    ] = 20.0

    def body_bytes(self) -> int:
        """Returns the number of bytes of bodies that a worker may have in memory. Raises BadParameter if one message
        does not fit."""
        return checked.body_bytes(self.max_body_bytes, least=_BODY_BYTES, max_message=self.max_message)


@dataclass(frozen=True, slots=True)
class Methods:
    """The options for the methods that clients may call, and for calls of several models."""

    dataplane_config: Annotated[
        str,
        typer.Option(
            envvar=["MESH_DATAPLANE_CONFIG", "MM_DATAPLANE_CONFIG"],
            metavar="JSON",
            help="Data-plane configuration: the methods that clients may call, and where each request has the model's "
            "id (docs/servers.md). Default: all methods.",
        ),
    ] = ""
    dataplane_config_path: Annotated[
        Path | None,
        typer.Option(
            envvar=["MESH_DATAPLANE_CONFIG_PATH", "MM_DATAPLANE_CONFIG_PATH"],
            help="File with the data-plane configuration, instead of --dataplane-config; read again when it changes.",
        ),
    ] = None
    multi_parallelism: Annotated[
        int,
        typer.Option(
            envvar=["MESH_MULTI_PARALLELISM", "MM_MULTI_PARALLELISM"],
            min=1,
            help="Number of models that one call with several model ids calls at the same time.",
        ),
    ] = 4

    def check(self) -> None:
        """Raises BadParameter for options that contradict each other."""
        if self.dataplane_config and self.dataplane_config_path is not None:
            text = "give --dataplane-config or --dataplane-config-path, not both"
            raise typer.BadParameter(text, param_hint="--dataplane-config")


def workers(text: str) -> int:
    """Returns the value of `--workers` as a number, 0 for `auto`. Raises BadParameter."""
    if text == "auto":
        return 0
    if not text.isdigit() or not 0 < int(text) <= 256:
        raise typer.BadParameter(f"{text!r} is neither auto nor a number from 1 to 256", param_hint="--workers")
    return int(text)
