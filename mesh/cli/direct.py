"""The frame of commands that connect to etcd directly. These commands are for admins, who may see and change
everything.

Such commands take the same options as routers and runtime pods (`mesh.options.etcd`), so they run in a pod, with its
environment, as well as through a port-forward. Errors of etcd become errors of the command line, with advice.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, TypeVar

from mesh.cli import options
from mesh.cli.exits import CommandError, Exit
from mesh.options.etcdsettings import EtcdSettings

if TYPE_CHECKING:  # it imports gRPC, a quarter of a second that `mesh --help` should not take
    from mesh.etcd import Etcd, EtcdError

T = TypeVar("T")


def run(settings: EtcdSettings, command: "Callable[[Etcd], Awaitable[T]]", *, as_json: bool = False) -> T:
    """Runs a command's coroutine with a client of etcd. If it fails, prints the error, and exits with the error's
    code."""
    from mesh.etcd import Etcd, EtcdError

    async def session() -> T:
        try:
            async with Etcd(settings) as etcd:
                return await command(etcd)
        except EtcdError as error:
            raise translated(error) from error
        except ValueError as error:  # about the client's settings
            raise CommandError(str(error), code=Exit.USAGE) from error

    return options.guarded(lambda: asyncio.run(session()), as_json=as_json)


def translated(error: "EtcdError") -> CommandError:
    """Converts an error of etcd to one of the command line."""
    from mesh.etcd import EtcdCompacted, EtcdDenied, EtcdUnavailable

    if isinstance(error, EtcdCompacted):
        text = "etcd has compacted the revision being read: reading took longer than etcd keeps its history. Try again"
        return CommandError(text, code=Exit.TRY_AGAIN, reason="COMPACTED")
    if isinstance(error, EtcdDenied):
        advice = "check the user and password (--etcd-user, --etcd-config) and the permissions of that user"
        return CommandError(f"etcd denied access ({error.detail}): {advice}", reason="DENIED")
    if isinstance(error, EtcdUnavailable):
        text = f"etcd does not answer ({error.detail}): check --etcd or --etcd-config; `mesh doctor` shows details"
        return CommandError(text, code=Exit.UNREACHABLE, reason="UNREACHABLE")
    return CommandError(error.detail, reason=error.reason.name)
