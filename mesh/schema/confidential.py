"""Detection of secrets in registrations, which are then refused, and masking of secrets in older records.

A registration is stored in etcd and shown to everyone who may read the mesh, including any password, key or signed URL
in it. Credentials belong in the storage secret, which only pods read.

Secrets are recognised in two ways:

- by their names, word by word (`session_token` is one, `tokenizer` is not): in the JSON of a key at any depth,
  including JSON within its strings, in settings such as `name=value`, and in the query or fragment of a URL;
- by unmistakable forms: `user:password@` in a URL, a private key, an account's connection string.

The functions are pure. Callers decide whether to refuse or to mask.

A million models may be registered at once, most of them with one of a few keys, so results for short keys are cached.
Measured: 1.2 us a model with a plain path and one of these keys; encoding its record takes 15 us.
"""

import functools
import json
import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote_plus

MASK = "***"

_SHORT = 1024  # longest key in characters whose result is cached

_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[0-9]+")
_LAST = frozenset(
    [
        *("secret", "password", "passwd", "passphrase", "pwd", "pass", "token", "signature", "sig", "sas", "jwt"),
        *("credential", "credentials", "authorization", "auth", "bearer", "cookie", "apikey", "accesstoken"),
        *("sastoken", "privatekey", "accountkey", "clientsecret"),
    ]
)
"""Last words of the names of secrets."""

_KEYS = frozenset(
    [
        *("access", "account", "api", "auth", "client", "encryption", "license", "master", "private", "secret"),
        *("service", "shared"),
    ]
)
"""Words before a last word "key" that also make a name secret."""

_SPECIAL = frozenset(["pad", "bos", "eos", "unk", "sep", "cls", "mask", "special", "start", "end"])
"""Words before a last word "token" that mean a token of a tokenizer, which is not secret."""

_GLUED = ("password", "passwd", "secret", "apikey", "accesskey", "connectionstring")
"""Endings of a name without a separator between its words (`PGPASSWORD`)."""

_TOO_DEEP = ("objects nested too deeply to be searched for secrets",)

_USERINFO = re.compile(r"(?<=://)[^/@\s?#]+(?=@)")
_PEM = re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.DOTALL)
_ACCOUNT = re.compile(r"(?i)\b(AccountKey|SharedAccessSignature|SharedAccessKey)=[^;\s]+")
_PARAMETER = re.compile(r"(?<=[?&#])([^=&#\s]+)=([^&#\s]+)")
_SETTING = re.compile(r"(?:^|(?<=[\s;,&]))([\w.-]+)=([^\s;,&]+)")
"""A setting in a key that is not JSON, or in a string of a key that is: `secret_access_key=...`. Paths are not searched
for settings, because a path may be called `token=1/model.onnx`."""


def found(path: str, key: str) -> list[str]:
    """Describes the secrets in a registration's path and key without repeating them."""
    in_key = _in_key(key)
    if not in_key and not _may_hold(path):
        return []  # most paths and keys hold no secret
    return [*(f"the path: {what}" for what in _in_text(path)), *(f"the key: {what}" for what in in_key)]


def masked_path(path: str) -> str:
    """Returns the path with its secrets masked."""
    return _masked_text(path)


def masked_key(key: str) -> str:
    """Returns the key with its secrets masked. A key without secrets is returned unchanged."""
    if not _in_key(key):
        return key
    try:
        document = _document(key)
        return _masked_setting(key) if document is None else json.dumps(_masked(document), ensure_ascii=False)
    except RecursionError:
        return MASK


def too_deep(key: str) -> bool:
    """Returns whether a key is nested too deeply to be searched for secrets."""
    return _in_key(key) == _TOO_DEEP


def is_secret(name: str) -> bool:
    """Returns whether the value of a setting with this name is secret."""
    words = [word.lower() for word in _WORD.findall(name.rpartition(".")[2])]
    if not words:
        return False
    if "".join(words).endswith(_GLUED):
        return True
    if words[-1] in _LAST:
        return not (words[-1] == "token" and len(words) > 1 and words[-2] in _SPECIAL)
    return words[-1] == "key" and not _KEYS.isdisjoint(words[:-1])


def _document(key: str) -> Any:
    """Parses the JSON of a key. Returns None if it is not JSON. Raises RecursionError if it is nested too deeply."""
    try:
        return json.loads(key)
    except ValueError:
        return None


def _in_key(key: str) -> tuple[str, ...]:
    if not key:
        return ()
    return _remembered(key) if len(key) <= _SHORT else _looked_for(key)


def _looked_for(key: str) -> tuple[str, ...]:
    try:
        document = _document(key)
        return tuple(dict.fromkeys(_in_setting(key) if document is None else _in_document(document, "")))
    except RecursionError:
        return _TOO_DEEP


_remembered = functools.lru_cache(maxsize=256)(_looked_for)


def _in_document(value: Any, name: str) -> Iterator[str]:
    match value:
        case dict():
            for part, inner in value.items():
                whole = f"{name}.{part}" if name else str(part)
                if is_secret(str(part)) and _is_value(inner):
                    yield whole[:200]
                else:
                    yield from _in_document(inner, whole)
        case list():
            for inner in value:
                yield from _in_document(inner, name)
        case str():
            if (document := _inner(value)) is not None:
                yield from _in_document(document, name)
                return
            for what in _in_setting(value):
                yield f"{what} in {name[:200]}" if name else what
        case _:
            return


def _inner(text: str) -> Any:
    """Parses a string within a key if it is itself a JSON object or list. Returns None for any other string."""
    return _document(text) if text.lstrip()[:1] in ("{", "[") else None


def _is_value(inner: Any) -> bool:
    """Returns whether a value can be secret: a string or a number, or a list of them."""
    if isinstance(inner, list):
        return any(map(_is_value, inner))
    return bool(inner) and isinstance(inner, str | int | float) and not isinstance(inner, bool)


def _may_hold(text: str) -> bool:
    return "@" in text or "=" in text or "-----" in text


def _in_setting(text: str) -> Iterator[str]:
    told = False
    for what in _in_text(text):
        told = True
        yield what
    if "=" in text and not told:
        for name, _ in _SETTING.findall(text):
            if is_secret(name):
                yield name[:100]


def _in_text(text: str) -> Iterator[str]:
    if not _may_hold(text):
        return
    if _USERINFO.search(text):
        yield "a user or password before @"
    for name, _ in _PARAMETER.findall(text):
        if is_secret(unquote_plus(name)):
            yield f"{unquote_plus(name)[:100]} in its query or fragment"
    if _PEM.search(text):
        yield "a private key"
    if _ACCOUNT.search(text):
        yield "the key of an account"


def _masked(value: Any) -> Any:
    match value:
        case dict():
            return {
                name: MASK if is_secret(str(name)) and _is_value(inner) else _masked(inner)
                for name, inner in value.items()
            }
        case list():
            return [_masked(inner) for inner in value]
        case str():
            if (document := _inner(value)) is not None and any(_in_document(document, "")):
                return json.dumps(_masked(document), ensure_ascii=False)
            return _masked_setting(value)
        case _:
            return value


def _masked_setting(text: str) -> str:
    return _SETTING.sub(lambda m: f"{m[1]}={MASK}" if is_secret(m[1]) else m[0], _masked_text(text))


def _masked_text(text: str) -> str:
    text = _USERINFO.sub(MASK, text)
    text = _PARAMETER.sub(lambda m: f"{m[1]}={MASK}" if is_secret(unquote_plus(m[1])) else m[0], text)
    return _ACCOUNT.sub(rf"\1={MASK}", _PEM.sub(MASK, text))
