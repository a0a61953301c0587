"""Access control in a router: the caller's identity and permissions.

`Guard` checks both for every interface: gRPC calls, REST, management, metrics. It compares a caller's key with the keys
that the feed delivers from etcd (`authority`) and with the admin keys in a file (`adminkeys`), and takes the decision
from the pure `mesh.access`. Each interface names the verb of the requested operation, from the table in `operations`.
"""
