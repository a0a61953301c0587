"""ModelMesh's JSON document with the connection to etcd, as existing installations have it."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.options import etcdsecret
from mesh.options.etcdsettings import EtcdFiles


def write(tmp_path, document) -> object:
    path = tmp_path / "etcd_connection"
    path.write_text(document if isinstance(document, str) else json.dumps(document))
    return path


def test_a_whole_one(tmp_path):
    """A complete Secret is read. Files next to the document override its contents."""
    (tmp_path / "ca.crt").write_text("CA")
    document = {
        "endpoints": "https://a:2379, https://b:2379",
        "userid": "root",
        "password": "hush-4711",
        "root_prefix": "/modelmesh/ns/",
        "certificate": "inline",
        "certificate_file": "ca.crt",
        "client_certificate": "CERT",
        "client_key": "KEY",
        "override_authority": "etcd.internal",
        "compose_deployment": "x",
    }
    found = etcdsecret.read(write(tmp_path, document))
    assert found.root_prefix == "modelmesh/ns"
    settings = found.settings
    assert settings.endpoints == ("https://a:2379", "https://b:2379")
    assert (settings.user, settings.password, settings.server_name) == ("root", "hush-4711", "etcd.internal")
    assert (settings.ca, settings.certificate, settings.private_key) == (b"CA", b"CERT", b"KEY")
    assert settings.files == EtcdFiles(config=str(tmp_path / "etcd_connection"), root_prefix="modelmesh/ns")
    assert "hush" not in repr(found)


@pytest.mark.parametrize(
    ("document", "endpoints"),
    [({"endpoints": "etcd:2379"}, ("http://etcd:2379",)), ({"endpoints": "e:1", "certificate": "C"}, ("https://e:1",))],
)
def test_a_certificate_says_that_it_is_tls(tmp_path, document, endpoints):
    assert etcdsecret.read(write(tmp_path, document)).settings.endpoints == endpoints


@pytest.mark.parametrize(
    ("document", "says"),
    [
        ("{", "not a JSON object"),
        ("[]", "not a JSON object"),
        ({}, "`endpoints` is missing"),
        ({"endpoints": " , "}, "`endpoints` is missing"),
        ({"endpoint": "http://a:1"}, "'endpoint' is not a known field"),
        ({"endpoints": 7}, "`endpoints` must be a string"),
        ({"endpoints": "http://a:1", "client_key": "K"}, "needs its key"),
        ({"endpoints": "http://a:1", "certificate_file": "../x"}, "not a path"),
        ({"endpoints": "http://a:1", "certificate_file": "gone.crt"}, "gone.crt"),
    ],
)
def test_what_is_wrong_is_told(tmp_path, document, says):
    with pytest.raises(ValueError, match=says) as error:
        etcdsecret.read(write(tmp_path, document))
    assert "etcd_connection" in str(error.value)


def test_a_missing_file_is_told(tmp_path):
    with pytest.raises(ValueError, match="No such file"):
        etcdsecret.read(tmp_path / "nowhere")


@given(st.binary(max_size=200))
def test_garbage_is_a_clear_error(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("garbage") / "etcd_connection"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="etcd_connection"):
        etcdsecret.read(path)
