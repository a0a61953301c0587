"""The beginning of an HTTP/2 connection, which distinguishes a stopped server from a busy one.

The kernel accepts connections for a stopped process, and a server whose threads are all busy answers no calls. But
HTTP/2 begins with the settings of both sides, which gRPC's transport sends without the server's own threads. A server
that does not send its settings within seconds is therefore stopped. gRPC's own pings would show this too, but servers
close connections that ping more often than every five minutes.
"""

import asyncio
import contextlib

from mesh.options.values import parse_address

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_SETTINGS = b"\0\0\0\4\0\0\0\0\0"  # an empty SETTINGS frame


async def runs(server: str, *, within: float) -> bool:
    """Returns whether a server answers or refuses a connection within `within` seconds. A refusal counts as an answer,
    because the link notices itself that the server has ended."""
    writer: asyncio.StreamWriter | None = None
    try:
        async with asyncio.timeout(within):
            if server.startswith("unix:"):
                reader, writer = await asyncio.open_unix_connection(server.removeprefix("unix:"))
            else:
                reader, writer = await asyncio.open_connection(*parse_address(server))
            writer.write(_PREFACE + _SETTINGS)
            await reader.read(1)
    except TimeoutError:
        return False
    except OSError:
        return True
    finally:
        if writer is not None:
            writer.transport.abort()
            with contextlib.suppress(OSError):
                await writer.wait_closed()
    return True
