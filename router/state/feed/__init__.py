"""The feed from the router pod to its workers. It carries etcd's content to workers, as named ranges, and their metrics
and readiness back to the pod.

If each worker watched etcd, the same work would be repeated in etcd and in every worker. Instead the pod follows each
range once (`following`), keeps the range's raw keys and values with the latest changes (`rangelog`), and passes them on
over one connection to each worker (`server`, `client`, `messages`).

Each range has its own revision. A worker names the ranges that it reads, and how far it has read each. It gets the
changes since then, or the complete range if those changes are no longer kept. If a range changes faster than a worker
reads, or etcd has compacted it, the complete range is sent again while the other ranges continue. Within a range, every
revision arrives complete and in order. Between ranges there is no order, as between any two watches of etcd.

The table in `ranges` lists the ranges. A range without a reader costs nothing: the pod begins to follow it once the
first worker asks for it. A new range needs a line in that table, and a reader in a `FeedClient`.
"""
