"""The relay's command line."""

import pytest

from mesh.runtime.relay import settings

NEEDED = ["--spi", "/run/spi", "--server", "unix:/run/server"]


def test_calls_go_to_the_server_unless_another_address_is_given():
    assert settings.parse(NEEDED).calls == ""
    assert settings.parse([*NEEDED, "--calls", "127.0.0.1:8033"]).calls == "127.0.0.1:8033"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        pytest.param(["--adapter", "mlserver"], "--adapter needs --server-models", id="no-folder"),
        pytest.param(["--adapter", "ovms", "--server-models", "/m"], "ovms needs --server-rest", id="no-rest-port"),
    ],
)
def test_an_adapter_without_what_it_needs_ends_the_relay_with_status_2(options, says, capsys):
    with pytest.raises(SystemExit) as error:
        settings.parse([*NEEDED, *options])
    assert error.value.code == 2
    assert says in capsys.readouterr().err
