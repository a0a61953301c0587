"""From the router pod to its workers: what etcd holds, as named ranges; and back: metrics and readiness.

A watch of etcd for each worker would cost etcd and every worker the same work again. So the pod follows each range
once (`following`), keeps it as raw keys and values with its latest changes (`rangelog`), and passes it on over one
connection a worker (`server`, `client`, `messages`).

Each range has a revision of its own. A worker names the ranges that it reads, and how far it has read each; from
there it is told the changes, and where those are no longer kept, the whole range. So a range that changes faster than
a worker reads, or that etcd compacted, is told again as a whole while the others go on. Within a range every revision
comes whole and in order; between ranges there is no order, as between any two watches of etcd.

Which ranges there are is the table in `ranges`. A range that nobody reads costs nothing: the pod begins to follow it
once the first worker asks for it. A new one takes a line in that table, and a reader given to `FeedClient`.
"""
