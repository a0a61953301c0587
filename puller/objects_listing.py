"""Listings of S3 that obstore cannot read: those with a key that is no path, such as `a//b` or `a/./b`.

obstore gives up a whole listing for one such key, and it may be anybody's: consoles and scripts make them by accident.
So where that happens the listing is asked for once more, here, by the API itself
(https://docs.aws.amazon.com/AmazonS3/latest/API/API_ListObjectsV2.html), and `tree` skips what no file can be called.

It takes the keys of an account, since requests are signed here; a pod's own identity is obstore's business, and with
one the key has to be renamed.
"""

import hashlib
import hmac
import ssl
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from datetime import UTC, datetime
from http import HTTPStatus
from typing import Any
from urllib.parse import quote, unquote_plus, urlsplit

from yarl import URL

from puller.errors import PullError, PullErrorKind
from puller.http_client import HttpClient, status_error

_MAX_PAGE = 16 * 2**20  # bytes; a thousand keys of the longest kind take a few
_EMPTY = hashlib.sha256(b"").hexdigest()


@dataclass(frozen=True, slots=True, repr=False)
class Account:
    """Who asks, and where: the keys of an account, or nobody's."""

    region: str
    access_key: str = ""
    secret: str = ""
    token: str = ""


async def everything(
    client: HttpClient,
    account: Account,
    *,
    endpoint: str,
    bucket: str,
    prefix: str,
    most: int,
    shown: str,
    trust: ssl.SSLContext | None,
) -> list[dict[str, Any]]:
    """Returns what obstore's listing has for each object below the prefix. Raises PullError."""
    found: list[dict[str, Any]] = []
    token = ""
    while True:
        query = {"list-type": "2", "encoding-type": "url", "prefix": prefix}
        if token:
            query["continuation-token"] = token
        async with client.translated(shown):
            url, headers = signed(f"{endpoint}/{quote(bucket)}", query, account, now=datetime.now(UTC))
            held = await client.send(
                URL(url, encoded=True), shown=shown, headers={}, secret=headers, trust=trust, follow=False
            )
            try:
                if held.response.status != HTTPStatus.OK:
                    raise status_error(held.response, shown)
                body = bytearray()
                async for piece in client.pieces(held.response, shown):
                    body += piece
                    if len(body) > _MAX_PAGE:
                        raise PullError(PullErrorKind.UNREACHABLE, f"{shown}: a page of the listing is too long")
            finally:
                held.release()
        page, token = parsed(bytes(body), shown)
        found += page
        if len(found) > most:
            text = f"{shown} holds more than {most} objects; name a folder below it"
            raise PullError(PullErrorKind.TOO_LARGE, text)
        if not token:
            return found


def signed(base: str, query: dict[str, str], account: Account, *, now: datetime) -> tuple[str, dict[str, str]]:
    """Returns the URL of a GET and its headers, with an AWS signature, version 4; with none for nobody."""
    split = urlsplit(base)
    text = "&".join(f"{quote(name, safe='-_.~')}={quote(value, safe='-_.~')}" for name, value in sorted(query.items()))
    url = f"{base}?{text}"
    if not account.access_key:
        return url, {}
    stamp = now.strftime("%Y%m%dT%H%M%SZ")
    headers = {"host": split.netloc, "x-amz-content-sha256": _EMPTY, "x-amz-date": stamp}
    if account.token:
        headers["x-amz-security-token"] = account.token
    names = ";".join(headers)
    lines = "".join(f"{name}:{value}\n" for name, value in headers.items())
    request = "\n".join(("GET", split.path or "/", text, lines, names, _EMPTY))
    scope = f"{stamp[:8]}/{account.region}/s3/aws4_request"
    to_sign = "\n".join(("AWS4-HMAC-SHA256", stamp, scope, hashlib.sha256(request.encode()).hexdigest()))
    key = f"AWS4{account.secret}".encode()
    for part in scope.split("/"):
        key = hmac.digest(key, part.encode(), "sha256")
    signature = hmac.digest(key, to_sign.encode(), "sha256").hex()
    authorization = (
        f"AWS4-HMAC-SHA256 Credential={account.access_key}/{scope}, SignedHeaders={names}, Signature={signature}"
    )
    del headers["host"]
    return url, {**headers, "Authorization": authorization}


def parsed(body: bytes, shown: str) -> tuple[list[dict[str, Any]], str]:
    """Returns a page's objects and the token of the next page, "" after the last. Raises PullError."""
    try:
        if b"<!DOCTYPE" in body:
            raise ValueError
        root = ElementTree.fromstring(body)
        encoded = _text(root, "EncodingType") == "url"
        found = []
        for item in root.iter():
            if _name(item) != "Contents":
                continue
            key = _text(item, "Key")
            path, size = unquote_plus(key) if encoded else key, int(_text(item, "Size"))
            changed = datetime.fromisoformat(_text(item, "LastModified"))
            found.append(
                {
                    # A marker of a folder ends in "/", which obstore leaves out.
                    "path": path if size else path.removesuffix("/"),
                    "size": size,
                    "e_tag": _text(item, "ETag") or None,
                    "last_modified": changed if changed.tzinfo else changed.replace(tzinfo=UTC),
                }
            )
        token = _text(root, "NextContinuationToken") if _text(root, "IsTruncated") == "true" else ""
    except (ElementTree.ParseError, ValueError):
        raise PullError(PullErrorKind.UNREACHABLE, f"{shown}: the store's listing cannot be understood") from None
    return found, token


def _name(item: ElementTree.Element) -> str:
    return item.tag.rpartition("}")[2]  # without its namespace, which some servers leave out


def _text(item: ElementTree.Element, name: str) -> str:
    return next((child.text or "" for child in item if _name(child) == name), "")
