"""A whole mesh on one machine, as child processes of `mesh up`.

`supervisor` starts the parts in order, watches and stops them; `parts` has their command lines; `child` watches one
process; `folder` ensures that a data directory has only one mesh; `lines` makes the children's logs readable. This
package imports neither the router nor the runtime. It starts them by their command lines, as a user would.
"""
