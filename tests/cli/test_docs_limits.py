"""docs/limits.md: the options and tests that it names exist, and its numbers are those in the code."""

import re
from pathlib import Path

import typer

import mesh.runtime.__main__ as runtime_main
import router.__main__ as router_main
from mesh.runtime.agent.settings import RuntimeSettings
from mesh.runtime.cache.loads import flights
from mesh.runtime.server import settings as server_settings
from mesh.runtime.server.calls import runs
from mesh.runtime.server.loads import loader
from mesh.runtime.server.v2 import tensors
from mesh.tokens import following, identities, keyset, kubernetes, locations
from mesh.wire import budget, pieces, server
from router.access import guard, reviewed, tokens
from router.calls import meter
from router.rest import bulk
from router.settings import RouterSettings

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs/limits.md").read_text()


def test_every_option_exists():
    options = {
        name
        for module in (router_main, runtime_main)
        for option in typer.main.get_command(module.app).params
        for name in option.opts
    }
    assert set(re.findall(r"--[a-z][a-z-]+[a-z]", TEXT)) <= options


def test_every_test_exists():
    named = set(re.findall(r"`(tests/[\w/.]+)`", TEXT))
    assert len(named) > 10
    assert [path for path in named if not (ROOT / path).exists()] == []


def test_the_numbers_are_those_of_the_code():
    settings = RouterSettings("r")
    assert settings.max_message == 16 << 20
    assert settings.max_body_bytes == settings.max_waiting_bytes == 256 << 20
    assert RuntimeSettings("p").max_body_bytes == server_settings.ServerSettings(Path()).max_body_bytes == 512 << 20
    assert settings.edge_memory == 384 << 20
    assert (settings.max_connections_per_pod, settings.max_waiters_per_model) == (1024, 2000)
    assert (settings.max_forwarded_message, pieces.ABOVE) == (0, 1 << 20)
    assert settings.min_body_rate == server.MIN_RATE == 32 << 10
    assert (server.PATIENCE, server.HASTE, budget.SMALL) == (10, 16, 64 << 10)
    assert (bulk.AT_ONCE, bulk.MAX_LINES, bulk.MAX_BAD, bulk.BATCH, bulk.IN_FLIGHT) == (2, 5_000_000, 10_000, 500, 4)
    assert (bulk.MAX_LINE, bulk.MAX_BYTES, bulk.BATCH_BYTES, bulk.MAX_REPORTED) == (64 << 10, 4 << 30, 256 << 10, 1000)
    assert (guard._MAX_HEADER, guard._MAX_PRINCIPALS, guard._MAX_BYTES) == (8192, 4096, 8 << 20)
    assert (identities.MAX_GROUPS, tokens.FAILURES, following.MAX_WAITING) == (500, (80, 400), 256)
    assert (kubernetes.MAX_AT_ONCE, reviewed.MAX_WAITING, reviewed.FAILURES) == (16, 256, (10, 40))
    assert (following.PAUSES[1] + locations.TIMEOUT, locations.TIMEOUT) == (15, 5)
    assert (keyset.MAX_BYTES, keyset.MAX_KEYS, keyset._RSA_BITS) == (256 << 10, 100, (2048, 8192))
    assert (meter.MAX_METHODS, flights.MAX_LOADS, loader.MAX_STUCK) == (64, 1024, 4)
    assert (runs.MAX_WAITING, runs.MAX_WAITING_BYTES, runs.MAX_SECONDS) == (1024, 256 << 20, 600)
    assert (tensors.MAX_TEXTS, tensors.MAX_RANK) == (262_144, 32)
