"""The options for tokens: which of them are refused at the start, with the way out, and which settings result."""

import dataclasses
import re

import pytest
import typer

from mesh.tokens.settings import ALGORITHMS, TokenSettings
from router.process.options import TokenOptions
from router.settings import RouterSettings
from tests.support.tokens import FakeIssuer

ISSUER = {"auth_jwt_issuer": "https://issuer.example", "auth_jwt_audience": "mesh"}


def refused(auth="required", **options):
    with pytest.raises(typer.BadParameter) as raised:
        TokenOptions(**options).check(auth)
    return f"{raised.value.param_hint}: {raised.value.message}"


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"auth_jwt_issuer": "https://i.example"}, "--auth-jwt-audience: name the audience"),
        ({**ISSUER, "auth_jwt_audience": " , "}, "--auth-jwt-audience: name the audience"),
        ({"auth_jwt_audience": "mesh"}, "--auth-jwt-audience: name the issuer too"),
        ({"auth_jwt_keys": "jwks.json"}, "--auth-jwt-keys: name the issuer too"),
        ({**ISSUER, "auth_jwt_issuer": "issuer.example"}, "--auth-jwt-issuer: 'issuer.example' is not an https URL"),
        ({**ISSUER, "auth_jwt_issuer": "http://issuer.example"}, "--auth-jwt-issuer: .*read over plain http only"),
        ({**ISSUER, "auth_jwt_keys": "http://issuer.example/keys"}, "--auth-jwt-keys: .*read over plain http only"),
        ({**ISSUER, "auth_jwt_keys": "ftp://issuer.example/keys"}, "--auth-jwt-keys: .*not an https URL"),
        ({**ISSUER, "auth_jwt_keys": "https://[::1/keys"}, "--auth-jwt-keys: .*not an https URL"),
        ({**ISSUER, "auth_jwt_keys": "/nowhere/jwks.json"}, "--auth-jwt-keys: there is no file /nowhere"),
        ({**ISSUER, "auth_jwt_algorithms": "RS256,HS256"}, "--auth-jwt-algorithms: 'HS256' is none of RS256"),
        ({**ISSUER, "auth_jwt_algorithms": "none"}, "--auth-jwt-algorithms: 'none' is none of"),
        ({"auth_kubernetes": "yes"}, "--auth-kubernetes: 'yes' is none of off, review, keys"),
    ],
)
def test_options_that_cannot_work_are_refused(options, why):
    assert re.match(why, refused(**options))


@pytest.mark.parametrize("options", [ISSUER, {"auth_kubernetes": "review"}])
def test_tokens_need_a_mesh_that_asks(options):
    assert refused("off", **options).startswith("--auth: tokens are only verified with")
    TokenOptions(**options).check("management")


def test_a_file_without_usable_keys_is_refused(tmp_path):
    path = tmp_path / "jwks.json"
    path.write_text('{"keys": []}')
    assert "none of its 0 keys" in refused(**ISSUER, auth_jwt_keys=str(path))
    path.write_bytes(FakeIssuer(algorithm="ES256").jwks)
    TokenOptions(**ISSUER, auth_jwt_keys=str(path)).check("required")
    assert "can verify signatures by RS256" in refused(**ISSUER, auth_jwt_keys=str(path), auth_jwt_algorithms="RS256")


def test_no_options_are_the_default_settings():
    options = TokenOptions()
    options.check("off")
    assert options.settings() == TokenSettings()
    assert not options.settings().wanted


def test_workers_get_the_settings(tmp_path):
    settings = TokenOptions(**ISSUER, auth_jwt_algorithms="ES256, RS256", auth_kubernetes="keys").settings()
    assert settings.algorithms == ("ES256", "RS256")
    assert set(settings.algorithms) < set(ALGORITHMS)
    whole = RouterSettings("r", auth="required", tokens=settings)
    whole.write(tmp_path / "settings.json")
    assert RouterSettings.read(tmp_path / "settings.json") == dataclasses.replace(whole)
