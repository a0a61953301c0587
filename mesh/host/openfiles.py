"""The limit on open files, which bounds the connections of a process.

HTTP/1.1 carries one call at a time on a connection, so a thousand streams need a thousand connections on each side of a
router. Shells and systemd start processes with a limit of 1,024, but usually allow processes to raise the limit.
"""

import resource


def raise_limit() -> int:
    """Raises this process's limit on open files to the hard limit, if the system allows it, and returns the limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (OSError, ValueError):  # a sandbox forbids the change
        return soft
    return hard
