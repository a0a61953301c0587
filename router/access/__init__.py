"""Access control in a router: the caller's identity and permissions.

`Guard` checks both for every interface: gRPC calls, REST, management, metrics. Authenticators identify the caller, each
by one kind of credentials (`credentials`). API keys are those that the feed delivers from etcd (`authority`), and the
admin keys in a file (`adminkeys`). The pure package `mesh.access` makes the decision. Each interface names the verb of
the requested operation, from the table in `operations`.
"""
