"""The control of access in a router: who calls, and may the caller do it.

`Guard` answers both for every door: gRPC calls, REST, management, metrics. It compares a caller's key
with those that the feed delivers from etcd (`authority`) and with the admin key of a file (`adminkeys`), and asks the
pure decision in `mesh.access`. Each door names the verb of what is asked for, from the table in `operations`.
"""
