"""The creation of obstore clients from a store's settings. Only this module deals with the library's peculiarities.

obstore was chosen for its speed (a third of boto3's CPU) and because it speaks to all three clouds. Its peculiarities,
and what this module does about them:

- Its constructors read the environment even if they are given settings: `AWS_SESSION_TOKEN` would be added to the keys
  of a secret, `AWS_ENDPOINT_URL_S3` overrides an endpoint, an account key in the environment overrides an explicit
  signature. Keys are therefore passed through a `credential_provider`, to which nothing is added, and every setting
  that the environment has a name for is given explicitly. Google's cannot be kept out entirely: see
  `_google_environment`.
- `timeout` (30 s) covers the whole body: a large object would never arrive. Here it is a day, and `read_timeout` ends a
  stalled transfer. It is never 0, with which every request fails immediately.
- By default, it retries ten times, even after refused connections and for wrong names, and counts the time from the
  first request. This is switched off, because `retry` knows what is already on disk. Two retries remain for clients
  that must fetch a token first.
- `.config`, `repr` and pickles of a client contain its secrets, so clients stay inside `objects`.
- It resolves names and follows redirects by itself, with no way to check an address. So Mesh's own proxy, `tunnel`,
  makes all of its connections.
- A child process that is forked after the first use hangs when it uses the library. Mesh never forks without exec.

Identity of a pod: without credentials in the settings, obstore uses the pod's own (instance role, workload identity,
environment). For S3 it always does, because roles exist for this purpose; for GCS and Azure only if there is a sign of
an identity, because with ModelMesh such settings meant a public bucket. `"identity": "anonymous"` or `"ambient"` in the
settings overrides this.
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import obstore.exceptions
from obstore.store import AzureStore, GCSStore, S3Store

from puller.credentials import StoreSettings
from puller.errors import PullErrorKind
from puller.http_client import HttpPolicy
from puller.objects_listing import Account, AzureLister, GoogleLister, Lister, S3Lister
from puller.tunnel import Grant, Tunnel, identity_urls

if TYPE_CHECKING:
    from obstore.store import AzureCredential, ClientConfig, RetryConfig, S3Credential

Client = S3Store | GCSStore | AzureStore

_GOOGLE = "https://storage.googleapis.com"
_AZURE_TRACES = (
    "AZURE_FEDERATED_TOKEN_FILE",
    "AZURE_CLIENT_SECRET",
    "AZURE_STORAGE_ACCOUNT_KEY",
    "AZURE_STORAGE_SAS_TOKEN",
    "AZURE_STORAGE_SAS_KEY",
    "AZURE_STORAGE_TOKEN",
    "AZURE_MSI_ENDPOINT",
    "AZURE_IDENTITY_ENDPOINT",
    "IDENTITY_ENDPOINT",
)
_GOOGLE_TRACES = (
    "GOOGLE_APPLICATION_CREDENTIALS",
    "GOOGLE_SERVICE_ACCOUNT",
    "GOOGLE_SERVICE_ACCOUNT_PATH",
    "GOOGLE_SERVICE_ACCOUNT_KEY",
    "GOOGLE_BEARER_TOKEN",
)
_SECRETS = {
    "gcs": ("private_key", "client_email"),
    "azure": ("account_key", "sas_token", "client_secret", "connection_string"),
}
"""Settings that a client would show to its endpoint, or to issuers of tokens."""

_ENDPOINTS = ("AWS_ENDPOINT_URL_STS", "AWS_ENDPOINT_URL_IAM", "AZURE_AUTHORITY_HOST")
_IDENTITY_HOSTS = frozenset(
    (host, 443)
    for host in (
        *("sts.amazonaws.com", f"sts.{os.environ.get('AWS_REGION', 'us-east-1')}.amazonaws.com"),
        *("oauth2.googleapis.com", "sts.googleapis.com", "iamcredentials.googleapis.com", "www.googleapis.com"),
        *("login.microsoftonline.com", "login.microsoftonline.us", "login.partner.microsoftonline.cn"),
    )
)
"""Issuers of tokens for a pod's own identity; inside some networks they have private addresses."""

_PORTS = {"http": 80, "https": 443}
_REGION = re.compile(r"[A-Za-z0-9-]{1,40}")


@dataclass(frozen=True, slots=True)
class Target:
    """A bucket or container at an endpoint, with the client that reads it."""

    client: Client
    endpoint: str  # for identities and errors; holds no credentials
    anonymous: bool
    lister: Lister | None = field(default=None, repr=False)  # the caller's identity is known here
    grant: Grant = field(default_factory=Grant, repr=False)  # of its connections
    ambient: str = ""  # the pod's own identity that is used, as far as its environment tells

    @property
    def host(self) -> str:
        """The host of the endpoint, with its port."""
        return urlsplit(self.endpoint).netloc


def endpoint_of(settings: StoreSettings) -> str:
    """Returns the endpoint that the settings name, or "" for the cloud's own. Raises PullError if it is not a URL."""
    url = settings.text("endpoint_url") or _connection(settings).get("blobendpoint", "")
    if not url:
        return ""
    try:
        split = urlsplit(url)
        valid = split.scheme in ("http", "https") and bool(split.hostname) and split.port != 0
    except ValueError:
        valid = False
    if not valid or split.query or split.username or split.fragment:
        raise settings.error(
            f"{'endpoint_url' if settings.text('endpoint_url') else 'BlobEndpoint in connection_string'} must be an "
            "http or https URL without user, query and fragment"
        ) from None
    return url.rstrip("/")


def connect(settings: StoreSettings, policy: HttpPolicy, *, on_google: bool, tunnel: Tunnel | None = None) -> Target:
    """Makes a client for the bucket that the settings name, without opening a connection. Raises PullError if the
    settings cannot be used, or if the operator does not allow their endpoint.

    `on_google` is true if this is a Google machine, on which an instance has an identity. All connections of the
    client are made by the `tunnel`, if one is given.
    """
    if chosen(settings):
        if not policy.allow_private:
            why = (
                "the registration sets the endpoint, which the operator does not allow; name the endpoint in the "
                "storage secret, or allow it (--http-allow-private)"
            )
            raise settings.error(why, PullErrorKind.FORBIDDEN)
        if settings.type != "s3" and not _own(settings):
            # Unlike S3's signatures, the tokens of the others would serve anyone who gets them.
            why = "the registration sets the endpoint but not the credentials; name the endpoint in the storage secret"
            raise settings.error(why, PullErrorKind.FORBIDDEN)
    endpoint = endpoint_of(settings)
    options: ClientConfig = {
        "allow_http": endpoint.startswith("http:"),
        "timeout": "24h",
        "connect_timeout": f"{policy.connect_timeout}s",
        "read_timeout": f"{policy.read_timeout}s",
        "user_agent": "mesh-puller",
    }
    pem = settings.text("certificate") + (("\n" + policy.ca.decode()) if policy.ca else "")
    if pem.strip():
        if "-----BEGIN CERTIFICATE-----" not in pem:
            raise settings.error("certificate must contain a certificate in PEM")
        options["root_certificate"] = pem
    grant = Grant(identity_urls=identity_urls(os.environ))
    if tunnel is not None:
        options["proxy_url"] = tunnel.url(grant)
    try:
        match settings.type:
            case "s3":
                return _granted(_s3(settings, endpoint, options), settings, grant)
            case "gcs":
                return _granted(_gcs(settings, endpoint, options, on_google), settings, grant)
            case "azure":
                return _granted(_azure(settings, endpoint, options), settings, grant)
    except (obstore.exceptions.BaseError, ValueError, FileNotFoundError):
        # The error's text may quote a key or a path of the environment.
        raise settings.error(
            "one of them, or a variable in the pod's environment, is not valid for a store of this type; check both"
        ) from None
    raise settings.error("the type must be s3, gcs or azure")


def _granted(target: Target, settings: StoreSettings, grant: Grant) -> Target:
    """Lets the client connect to the hosts that the operator named, even if they are not open to all, and ask for the
    pod's identity if the target uses it. Does neither if a registration chose the servers."""
    if not chosen(settings):
        named = [target.endpoint, settings.text("authority_host"), *map(os.environ.get, _ENDPOINTS)]
        splits = [urlsplit(url) for url in named if url]
        hosts = {(split.hostname, split.port or _PORTS.get(split.scheme)) for split in splits}
        grant.home = _IDENTITY_HOSTS | {(host, port) for host, port in hosts if host and port}
        grant.identity = bool(target.ambient)
    return replace(target, grant=grant)


def _s3(settings: StoreSettings, endpoint: str, options: "ClientConfig") -> Target:
    key, secret = _both(settings, "access_key_id", "secret_access_key")
    anonymous = not key and _identity(settings) == "anonymous"
    region = settings.text("region")
    if not key and not anonymous:
        region = region or os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or ""
        endpoint = endpoint or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
        options["allow_http"] = endpoint.startswith("http:")
    region = region or "us-east-1"
    if not _REGION.fullmatch(region):
        raise settings.error(f"region {region[:50]!r} is not valid: use one such as us-east-1")
    endpoint = endpoint or f"https://s3.{region}.amazonaws.com{'.cn' if region.startswith('cn-') else ''}"
    token = settings.text("session_token") or None

    def credentials() -> "S3Credential":
        return {"access_key_id": key, "secret_access_key": secret, "token": token, "expires_at": None}

    client = S3Store(
        settings.text("bucket"),
        config={
            "endpoint": endpoint,
            "aws_endpoint_url_s3": endpoint,  # would override `endpoint` if it came from the environment
            "region": region,
            "virtual_hosted_style_request": False,
            "s3_express": False,
            "skip_signature": anonymous,
        },
        client_options=options,
        retry_config=_retries(0 if key or anonymous else 2),
        credential_provider=credentials if key else None,
    )
    account = Account(region, key, secret, token or "") if key or anonymous else _account(region)
    lister = S3Lister(endpoint, settings.text("bucket"), account) if account is not None else None
    return Target(client, endpoint, anonymous, lister, ambient="" if key or anonymous else _ambient("AWS_"))


def _account(region: str) -> Account | None:
    """Returns the keys in the pod's environment, or None if there are none."""
    key, secret = os.environ.get("AWS_ACCESS_KEY_ID", ""), os.environ.get("AWS_SECRET_ACCESS_KEY", "")
    return Account(region, key, secret, os.environ.get("AWS_SESSION_TOKEN", "")) if key and secret else None


def _gcs(settings: StoreSettings, endpoint: str, options: "ClientConfig", on_google: bool) -> Target:
    email, key = _both(settings, "client_email", "private_key")
    identity = _identity(settings)
    ambient = not key and (identity == "ambient" or (not identity and _ambient_google(on_google)))
    endpoint = endpoint or _GOOGLE
    config: dict[str, Any] = {"base_url": endpoint, "skip_signature": not key and not ambient}
    if key:
        _google_environment(settings)
        # Its requests carry tokens that it signs itself, so `token_uri` is not asked.
        account = {"type": "service_account", "client_email": email, "private_key": key}
        config["service_account_key"] = json.dumps({**account, "private_key_id": settings.text("private_key_id")})
    client = GCSStore(
        settings.text("bucket"),
        config=config,  # type: ignore[arg-type]
        client_options=options,
        retry_config=_retries(2 if ambient else 0),
    )
    lister = GoogleLister(endpoint, settings.text("bucket"), email, key, settings.text("private_key_id"))
    traces = _ambient("GOOGLE_", "CLOUDSDK_") if ambient else ""
    return Target(client, endpoint, not key and not ambient, None if ambient else lister, ambient=traces)


def _azure(settings: StoreSettings, endpoint: str, options: "ClientConfig") -> Target:
    said = _connection(settings)
    account = settings.text("account_name") or said.get("accountname", "")
    key = settings.text("account_key") or said.get("accountkey", "")
    signature = (settings.text("sas_token") or said.get("sharedaccesssignature", "")).lstrip("?")
    parts = [settings.text(name) for name in ("client_id", "client_secret", "tenant_id")]
    principal = all(parts)
    if settings.has("client_secret") and not principal:
        raise settings.error("client_id, client_secret and tenant_id must be given together")
    if not endpoint:
        suffix = said.get("endpointsuffix") or "core.windows.net"
        endpoint = f"https://{account}.blob.{suffix}"
    explicit = bool(key or signature or principal)
    identity = _identity(settings)
    traced = any(os.environ.get(name) for name in _AZURE_TRACES)
    ambient = not explicit and (identity == "ambient" or (not identity and traced))
    config: dict[str, Any] = {
        "account_name": account,
        "endpoint": endpoint,
        "use_emulator": False,  # the client would ignore the endpoint
        "skip_signature": not explicit and not ambient,
    }
    provider = None
    if key or signature:

        def provider() -> "AzureCredential":
            if key:
                return {"access_key": key, "expires_at": None}
            return {"sas_token": signature, "expires_at": None}

    elif principal:
        config["client_id"], config["client_secret"], config["tenant_id"] = parts
        config["credential_type"] = "client_secret"
        if settings.has("authority_host"):
            config["authority_host"] = settings.text("authority_host")
    elif ambient:
        config["credential_type"] = "auto"
        if settings.has("client_id"):
            config["client_id"] = settings.text("client_id")  # which of several identities
    client = AzureStore(
        settings.text("container"),
        config=config,  # type: ignore[arg-type]
        client_options=options,
        retry_config=_retries(2 if ambient or principal else 0),
        credential_provider=provider,
    )
    traces = _ambient("AZURE_", "IDENTITY_") if ambient else ""
    lister = AzureLister(endpoint, settings.text("container"), account, key, signature)
    known = bool(key or signature) or not (principal or ambient)
    return Target(client, endpoint, not explicit and not ambient, lister if known else None, ambient=traces)


def _ambient(*prefixes: str) -> str:
    """Returns a string that stays equal while the environment gives the pod the same identity, and that does not reveal
    it."""
    found = sorted((name, value) for name, value in os.environ.items() if name.startswith(prefixes))
    return hashlib.blake2b(json.dumps(found).encode(), digest_size=16).hexdigest()


def _retries(count: int) -> "RetryConfig":
    backoff = {"init_backoff": timedelta(milliseconds=100), "max_backoff": timedelta(seconds=1), "base": 2}
    return {"max_retries": count, "retry_timeout": timedelta(seconds=30), "backoff": backoff}  # type: ignore[typeddict-item]


def _identity(settings: StoreSettings) -> str:
    identity = settings.text("identity")
    if identity not in ("", "ambient", "anonymous"):
        raise settings.error('identity must be "ambient" or "anonymous"')
    if settings.type != "s3" and chosen(settings):
        return "anonymous"  # the pod's tokens are never sent to an endpoint that a registration chose
    return identity


def chosen(settings: StoreSettings) -> bool:
    """Returns whether a registration, rather than the operator, chooses the servers."""
    if settings.overridden("endpoint_url", "authority_host"):
        return True
    return settings.overridden("connection_string") and any(
        _connection(settings).get(part) for part in ("blobendpoint", "endpointsuffix", "defaultendpointsprotocol")
    )


def _own(settings: StoreSettings) -> bool:
    """Returns whether no credentials of the operator are sent: only a registration's, or none."""
    return all(settings.overridden(name) for name in _SECRETS[settings.type] if settings.has(name))


def _both(settings: StoreSettings, one: str, other: str) -> tuple[str, str]:
    pair = settings.text(one), settings.text(other)
    if bool(pair[0]) != bool(pair[1]):
        raise settings.error(f"{one} and {other} must be given together")
    return pair


def _connection(settings: StoreSettings) -> Mapping[str, str]:
    """Returns the parts of an Azure connection string, names in lower case."""
    if settings.type != "azure":
        return {}
    pairs = (item.partition("=") for item in settings.text("connection_string").split(";"))
    return {name.strip().lower(): value.strip() for name, _, value in pairs if name.strip()}


def _ambient_google(on_google: bool) -> bool:
    if on_google or any(os.environ.get(name) for name in _GOOGLE_TRACES):
        return True
    folder = os.environ.get("CLOUDSDK_CONFIG") or os.path.expanduser("~/.config/gcloud")
    return os.path.exists(os.path.join(folder, "application_default_credentials.json"))


def _google_environment(settings: StoreSettings) -> None:
    """Raises PullError if the environment would replace explicit credentials, because obstore lets it do that."""
    for name in ("GOOGLE_BEARER_TOKEN", "GOOGLE_SERVICE_ACCOUNT", "GOOGLE_SERVICE_ACCOUNT_PATH"):
        if os.environ.get(name):
            raise settings.error(
                f"{name} in the pod's environment would override the credentials given here; remove one of them"
            )
