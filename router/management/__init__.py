"""Management: what gRPC, REST and whatever door comes next call, without knowing of any of them.

A function here takes a typed request or an id and returns a typed result; failures are MeshErrors. Turning messages and
documents into those and back is `router.services.modelmesh`'s and `router.rest.management`'s.

| module | holds |
| --- | --- |
| `operations` | what can be asked for, one line each, and which verb each is |
| `handlers` | the nouns below, put together |
| `registration`, with `creation` and `withdrawal` | registering, changing and unregistering models |
| `loading` | having a model loaded |
| `status` | how a model is; lists |
| `inspection`, with `explanation` | why a model is where it is |
| `pods`, with `descriptions` | pods, routers, and lives that are cut off |
| `tuning` | the settings that change while the mesh runs |

All state is in etcd, so nothing here needs to be told to other workers: a registration is a transaction that holds only
where the id is free *and* no copy of a former life of it is left; and "no such model" is never remembered (`registry`).
So a model is callable through any worker of any router the moment its registration has returned, and never answers from
a former life. Everything is bounded by etcd's and the agents' time-outs.
"""
