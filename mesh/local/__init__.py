"""A whole mesh on one machine, as child processes of one: `mesh up`.

`supervisor` starts the parts in order, minds them and takes them down; `parts` knows their command lines; `child` minds
one process; `folder` keeps two meshes from one data directory; `lines` makes the children's logs readable. How etcd is
started stands in `etcd`. Nothing here imports the router or the runtime: they are started as anybody would start them.
"""
