"""Makes the shared fixtures known to all tests; what they are stands in tests/support/fixtures.py."""

from tests.support.fixtures import etcd, etcd_server, keys, own_etcd

__all__ = ["etcd", "etcd_server", "keys", "own_etcd"]
