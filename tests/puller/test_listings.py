"""Listings by the puller's own requests: their signatures, and how pages are read. tests/stores has the tests with real
servers."""

import base64
import json
import xml.etree.ElementTree as ElementTree
from datetime import UTC, datetime
from urllib.parse import parse_qsl, urlsplit

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa

from puller import objects_listing as listing
from puller.errors import PullError, PullErrorKind

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
AZURE = """<?xml version="1.0"?><EnumerationResults><Blobs>
<Blob><Name>t/a//b</Name><Properties><Last-Modified>Fri, 02 Jan 2026 03:04:05 GMT</Last-Modified>
<Etag>0x8D</Etag><Content-Length>3</Content-Length></Properties></Blob>
<Blob><Name Encoded="true">t%2F%EF%BF%BF</Name><Properties><Last-Modified>Fri, 02 Jan 2026 03:04:05 GMT</Last-Modified>
<Content-Length>1</Content-Length></Properties></Blob>
<Blob><Name>t/sub/</Name><Properties><Last-Modified>Fri, 02 Jan 2026 03:04:05 GMT</Last-Modified>
<Etag>0x8E</Etag><Content-Length>0</Content-Length></Properties></Blob>
</Blobs><NextMarker>more</NextMarker></EnumerationResults>"""
S3 = """<ListBucketResult xmlns="http://doc.s3.amazonaws.com/2006-03-01"><EncodingType>url</EncodingType>
<Contents><Key>t/a+%2F%2Fb</Key><Size>3</Size><ETag>"1"</ETag><LastModified>2026-01-02T03:04:05Z</LastModified></Contents>
<IsTruncated>true</IsTruncated><NextContinuationToken>more</NextContinuationToken></ListBucketResult>"""


def query(url: str) -> dict[str, str]:
    return dict(parse_qsl(urlsplit(url).query))


def decoded(part: str) -> bytes:
    return base64.urlsafe_b64decode(part + "=" * (-len(part) % 4))


def test_a_service_account_of_google_signs_its_own_token():
    key = rsa.generate_private_key(65537, 2048)
    pem = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    ).decode()
    lister = listing.GoogleLister("https://storage.googleapis.com", "b", "me@project", pem, "k1")
    url, headers = lister.request("t/", "more", now=NOW)
    assert urlsplit(url).path == "/b"
    assert query(url) == {"list-type": "2", "encoding-type": "url", "prefix": "t/", "continuation-token": "more"}
    signed, _, signature = headers["Authorization"].removeprefix("Bearer ").rpartition(".")
    head, claims = (json.loads(decoded(part)) for part in signed.split("."))
    assert (head["alg"], head["kid"], claims["iss"], claims["sub"]) == ("RS256", "k1", "me@project", "me@project")
    assert claims["exp"] - claims["iat"] == 3600
    assert "read_only" in claims["scope"]
    try:
        key.public_key().verify(decoded(signature), signed.encode(), padding.PKCS1v15(), hashes.SHA256())
    except InvalidSignature:
        pytest.fail("the signature is not the account's")
    assert pem not in repr(lister)


def test_a_caller_without_credentials_signs_nothing():
    """A caller without credentials signs nothing, as public buckets and containers require."""
    for lister in (
        listing.GoogleLister("https://storage.googleapis.com", "b"),
        listing.AzureLister("https://a.blob.core.windows.net", "c", "a"),
        listing.S3Lister("https://s3.amazonaws.com", "b", listing.Account("us-east-1")),
    ):
        url, headers = lister.request("t/", "", now=NOW)
        assert "Authorization" not in headers
        assert "sig" not in query(url)


def test_azure_is_shown_a_signature_or_a_key():
    given = "sv=2021&sig=a%2Bb"
    url, headers = listing.AzureLister("https://a.blob.core.windows.net", "c", "a", "", given).request("", "x", now=NOW)
    assert url.endswith(f"&{given}")
    assert query(url)["marker"] == "x"
    assert "Authorization" not in headers
    lister = listing.AzureLister("https://a.blob.core.windows.net", "c", "a", base64.b64encode(b"k").decode(), given)
    url, headers = lister.request("", "", now=NOW)
    assert headers["Authorization"].startswith("SharedKey a:")
    assert "sig" not in query(url)
    assert given not in repr(lister)


def test_what_a_page_of_azure_holds():
    found, token = listing.parsed(listing.AzureLister("https://a", "c", "a"), AZURE.encode(), "azure://a/c")
    assert token == "more"
    assert [(one["path"], one["size"], one["e_tag"]) for one in found] == [
        ("t/a//b", 3, "0x8D"),
        ("t/\uffff", 1, None),
        ("t/sub", 0, "0x8E"),
    ]
    assert {one["last_modified"] for one in found} == {NOW}


def test_what_a_page_of_s3_and_google_holds():
    for lister in (listing.GoogleLister("https://g", "b"), listing.S3Lister("https://s", "b", listing.Account("r"))):
        found, token = listing.parsed(lister, S3.encode(), "s3://b")
        assert (found, token) == ([{"path": "t/a //b", "size": 3, "e_tag": '"1"', "last_modified": NOW}], "more")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<a>",
        b"{}",
        b"<!DOCTYPE a><a/>",
        b"<E><Blobs><Blob/></Blobs></E>",
        AZURE.replace("3</Content-Length>", "x</Content-Length>").encode(),
        AZURE.replace("Fri, 02 Jan 2026", "soon").encode(),
    ],
)
def test_what_is_no_page(body):
    with pytest.raises(PullError) as error:
        listing.parsed(listing.AzureLister("https://a", "c", "a"), body, "azure://a/c")
    assert error.value.kind is PullErrorKind.UNREACHABLE


def test_a_page_without_objects():
    """A page without objects is an empty listing, even if the element that would contain them is missing."""
    assert listing.AzureLister("https://a", "c", "a").page(ElementTree.fromstring("<E/>")) == ([], "")
