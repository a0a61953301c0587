"""Whether a port is free, asked before anything is started: a child that dies of a taken port says it worse."""

import errno
import socket

from mesh.local.settings import UpError
from mesh.settings import parse_address


def check_free(address: str, option: str) -> None:
    """Raises UpError with the way out where somebody listens on it, or where it cannot be listened on."""
    host, port = parse_address(address)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        # As servers do, so that connections of a former life in TIME_WAIT are no hindrance.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
            probe.listen(1)  # with SO_REUSEADDR, binding alone succeeds beside another that has bound and not listened
        except PermissionError as error:
            raise UpError(f"port {port} may not be used by this user: choose one above 1023 with {option}") from error
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                example = f"{option} {host if ':' not in host else f'[{host}]'}:{port + 1}"
                if option == "--etcd-port":
                    example = f"{option} {port + 1}"
                raise UpError(f"port {port} is taken by another program: choose another with {example}") from error
            raise UpError(f"{address} cannot be listened on: {error.strerror}; choose another with {option}") from error
