"""The feed from the router pod to its workers: etcd's content, as named ranges; and back: metrics and readiness.

A watch of etcd for each worker would repeat the same work in etcd and in every worker. So the pod follows each range
once (`following`), keeps it as raw keys and values with its latest changes (`rangelog`), and passes it on over one
connection a worker (`server`, `client`, `messages`).

Each range has a revision of its own. A worker names the ranges that it reads, and how far it has read each; from
there it gets the changes, or the whole range if the changes are no longer kept. So a range that changes faster than
a worker reads, or that etcd compacted, is sent again as a whole while the others go on. Within a range every revision
arrives whole and in order; between ranges there is no order, as between any two watches of etcd.

The table in `ranges` lists the ranges. A range without a reader costs nothing: the pod begins to follow it once the
first worker asks for it. A new range takes a line in that table, and a reader given to `FeedClient`.
"""
