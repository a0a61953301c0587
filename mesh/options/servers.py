"""Addresses of model servers, as operators write them."""

from mesh.options.values import format_address, parse_address


def target(text: str) -> str:
    """Returns an address as gRPC names it, from `HOST:PORT`, `tcp://HOST:PORT`, `unix:/PATH` or `unix:///PATH`. Raises
    ValueError."""
    if text.startswith("unix:"):
        path = text.removeprefix("unix:").removeprefix("//")
        if not path.startswith("/"):
            raise ValueError(f"{text!r} does not name a socket by its absolute path, such as unix:/run/server.sock")
        return f"unix:{path}"
    return format_address(*parse_address(text.removeprefix("tcp://")))
