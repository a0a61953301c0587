"""What commands share that go to etcd themselves, past the mesh: an admin's, who may see and change everything.

They take the options of routers and runtime pods (`mesh.options.etcd`), so they run with a pod's own environment
as well as beside a port-forward. etcd's errors become the command line's, with what to do.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, TypeVar

from mesh.cli import options
from mesh.cli.exits import CommandError, Exit
from mesh.options.etcdsettings import EtcdSettings

if TYPE_CHECKING:  # it brings gRPC, a quarter of a second that `mesh --help` should not take
    from mesh.etcd import Etcd, EtcdError

T = TypeVar("T")


def run(settings: EtcdSettings, command: "Callable[[Etcd], Awaitable[T]]", *, as_json: bool = False) -> T:
    """Runs a command's coroutine with a client of etcd. Errors are printed and end the process with their code."""
    from mesh.etcd import Etcd, EtcdError

    async def session() -> T:
        try:
            async with Etcd(settings) as etcd:
                return await command(etcd)
        except EtcdError as error:
            raise translated(error) from error
        except ValueError as error:  # of the client's settings
            raise CommandError(str(error), code=Exit.USAGE) from error

    return options.guarded(lambda: asyncio.run(session()), as_json=as_json)


def translated(error: "EtcdError") -> CommandError:
    """etcd's error as the command line's."""
    from mesh.etcd import EtcdCompacted, EtcdDenied, EtcdUnavailable

    if isinstance(error, EtcdCompacted):
        text = (
            "etcd has forgotten the revision that was being read: it took longer than etcd keeps its history. Try again"
        )
        return CommandError(text, code=Exit.TRY_AGAIN, reason="COMPACTED")
    if isinstance(error, EtcdDenied):
        advice = "check user, password (--etcd-user, --etcd-config), and what the user may"
        return CommandError(f"etcd refuses it ({error.detail}): {advice}", reason="DENIED")
    if isinstance(error, EtcdUnavailable):
        text = f"etcd does not answer ({error.detail}): check --etcd or --etcd-config; `mesh doctor` tells more"
        return CommandError(text, code=Exit.UNREACHABLE, reason="UNREACHABLE")
    return CommandError(error.detail, reason=error.reason.name)
