"""Tokens that others issue: JWTs of an OIDC issuer, and tokens of Kubernetes service accounts.

`verification` is pure: it gets the keys and the time. The keys of an issuer (a JWKS) come from a file, a URL, or the
issuer's discovery document (`locations`), and are kept current (`following`). Kubernetes can be asked about a token
instead (`kubernetes`). `identities` says which principal a token stands for.

This package caches no results and limits no callers: routers do (`router.access.tokens`).
"""
