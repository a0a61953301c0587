"""The guard that a router's settings describe."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from router.access.adminkeys import AdminKeys
from router.access.authority import Authority
from router.access.credentials import Authenticator
from router.access.guard import OFF, Guard
from router.settings import RouterSettings

if TYPE_CHECKING:
    from mesh.tokens.settings import TokenSettings
    from router.access.tokens import TokenSource


def guard(settings: RouterSettings, authority: Authority) -> Guard:
    """Returns the guard of one process. Raises ValueError for a file that cannot be used, or if tokens of Kubernetes
    are wanted outside a cluster."""
    others: list[Authenticator] = []
    if settings.tls_client_ca and settings.auth != OFF:  # then the edge is an Envoy, which verifies the certificates
        from router.access.clientcerts import ClientCertificates  # cryptography takes memory

        others.append(ClientCertificates())
    if settings.tokens.wanted and settings.auth != OFF:
        from router.access.tokens import Tokens  # with PyJWT and cryptography, which most meshes do not need

        others.append(Tokens(sources(settings.tokens)))
    return Guard(authority, mode=settings.auth, admin=AdminKeys(settings.admin_key_file), others=others)


def sources(settings: "TokenSettings", *, wall: Callable[[], float] = time.time) -> "list[TokenSource]":
    """Returns the sources of the tokens that are accepted. `wall` returns seconds since the epoch. Raises ValueError if
    tokens of Kubernetes are wanted outside a cluster."""
    from mesh.tokens import identities
    from mesh.tokens.following import Following
    from mesh.tokens.locations import File, Remote
    from mesh.tokens.verification import Rules
    from router.access.tokens import IssuedTokens

    found: list[TokenSource] = []
    if settings.issuer:
        in_file = settings.keys and "://" not in settings.keys
        ca = Path(settings.ca) if settings.ca else None
        location = File(Path(settings.keys)) if in_file else Remote(settings.issuer, settings.keys, ca=ca)
        rules = Rules(settings.issuer, settings.audiences, settings.skew)
        found.append(
            IssuedTokens(
                Following(location, algorithms=settings.algorithms),
                wall=wall,
                rules=lambda: rules,
                algorithms=settings.algorithms,
                takes=lambda token: token.issuer == settings.issuer,
                principal=lambda claims: identities.user(
                    claims, name=settings.user_claim, groups=settings.groups_claim
                ),
            )
        )
    if settings.kubernetes != "off":
        found.append(_kubernetes(settings, wall))
    return found


def _kubernetes(settings: "TokenSettings", wall: Callable[[], float]) -> "TokenSource":
    from mesh.certificates.keeping import StoreError
    from mesh.certificates.secret import ACCOUNT, Cluster
    from mesh.tokens import identities
    from mesh.tokens.following import Following
    from mesh.tokens.kubernetes import ClusterKeys, Reviewer
    from mesh.tokens.settings import ALGORITHMS, REVIEW
    from mesh.tokens.verification import Rules
    from router.access.reviewed import ReviewedTokens
    from router.access.tokens import IssuedTokens

    try:
        cluster = Cluster.of_pod(settings.kubernetes_api, Path(settings.kubernetes_account or ACCOUNT))
    except StoreError as error:
        raise ValueError(
            "--auth-kubernetes works only in a pod of Kubernetes, and KUBERNETES_SERVICE_HOST is not set"
        ) from error
    audiences = settings.kubernetes_audiences
    if settings.kubernetes == REVIEW:
        return ReviewedTokens(Reviewer(cluster, audiences), audiences=audiences, wall=wall)
    following = Following(ClusterKeys(cluster))
    return IssuedTokens(
        following,
        wall=wall,
        # An API server's own audience is its issuer, unless it was configured otherwise.
        rules=lambda: Rules(following.issuer, audiences or (following.issuer,)),
        algorithms=ALGORITHMS,
        takes=lambda token: identities.is_account(token.claims.get("sub")),
        principal=lambda claims: identities.account(claims.get("sub")),
    )
