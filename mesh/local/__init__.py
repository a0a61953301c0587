"""A whole mesh on one machine, as child processes of `mesh up`.

`supervisor` starts the parts in order, watches and stops them; `parts` has their command lines; `child` watches one
process; `folder` prevents two meshes in one data directory; `lines` makes the children's logs readable. Nothing here
imports the router or the runtime: they are started through their command lines, as a user would start them.
"""
