"""Management of models and pods, independent of the transports (gRPC, REST) that call it.

A function of this package gets a typed request or an id, and returns a typed result or raises MeshError.
`router.services.modelmesh` and `router.rest.management` convert messages and documents.

| module | contents |
| --- | --- |
| `handlers` | the modules below, put together |
| `requests` | the requests and their validation |
| `registration`, with `creation` | registering, changing and unregistering models |
| `loading` | loads on request |
| `status` | the status of a model; lists |
| `inspection`, with `explanation` | the reasons for the places of a model's copies |
| `pods`, with `descriptions` | pods, routers, and lives that are cut off |
| `vmodels` | the requests about vmodels |
| `tuning` | the settings that change while the mesh runs |
| `statistics` | a summary of a router's metrics |

All state is in etcd, so other workers do not have to be informed. A registration is a transaction that succeeds only if
the id is free *and* no copy of an old registration is left. "No such model" is never cached (`registry`). A model can
therefore be called through any worker of any router once its registration has returned, and an old registration never
answers. The timeouts of etcd and of the agents bound every operation.
"""
