"""The `mesh` command: a thin client of the REST interface, and what starts processes on this machine.

It imports neither the router nor the runtime: `mesh router`, `mesh runtime` and `mesh up` start them as processes, and
everything else goes over the network as anybody's program could. One module a group of commands; `client` is the REST
client, `output` and `exits` are what all commands share.
"""


def main() -> int:
    """Runs the command line of this process and returns its exit code."""
    try:
        from mesh.cli.app import run

        return run()
    except KeyboardInterrupt:  # while modules are imported
        return 130
