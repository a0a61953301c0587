"""Makes the shared fixtures known to all tests; what they are stands in tests/support/fixtures.py."""

from hypothesis import settings

from tests.support.fixtures import etcd, etcd_server, keys, own_etcd

__all__ = ["etcd", "etcd_server", "keys", "own_etcd"]

# How long an example takes says how busy the machine is, not whether the code is right.
settings.register_profile("mesh", deadline=None)
settings.load_profile("mesh")
