"""The `mesh` command: a thin client of the REST interface, and the commands that start processes on this machine.

This package imports neither the router nor the runtime. `mesh router`, `mesh runtime` and `mesh up` start them as
processes. The other commands use the network interface, as any program can. Most modules contain one group of commands.
`client` is the REST client; all commands use `output` and `exits`.
"""


def main() -> int:
    """Runs the command line of this process and returns its exit code."""
    try:
        from mesh.cli.app import run

        return run()
    except KeyboardInterrupt:  # while modules are imported
        return 130
