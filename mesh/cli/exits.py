"""Exit codes, which scripts may rely on, and the errors that end a command with an exit code."""

import enum

from mesh.statuses import MeshError, Reason


class Exit(enum.IntEnum):
    """The exit code of a command."""

    OK = 0
    FAILED = 1
    USAGE = 2
    NOT_FOUND = 3
    UNREACHABLE = 4
    LOAD_FAILED = 5
    TRY_AGAIN = 6
    INTERRUPTED = 130


EXPLAINED = (
    "Exit codes: 0 success, 1 failure, 2 wrong usage, 3 no such model, alias, pod, key or grant, 4 no mesh answers, "
    "5 the model cannot be loaded, 6 not now (no room, or a timeout): try again, 130 interrupted."
)

_OF_REASON = {
    Reason.UNKNOWN_MODEL: Exit.NOT_FOUND,
    Reason.LOAD_FAILED: Exit.LOAD_FAILED,
    Reason.CONTENT_CHANGED: Exit.LOAD_FAILED,
    Reason.QUARANTINED: Exit.LOAD_FAILED,
    Reason.NOWHERE: Exit.LOAD_FAILED,
}


class CommandError(Exception):
    """An error that ends the command. `text` is shown to the user, `code` is the exit code, `reason` is a name for
    programs.

    If `answered` is true, the command has already printed its answer, and with --json no second document may follow.
    """

    def __init__(self, text: str, *, code: Exit = Exit.FAILED, reason: str = "", answered: bool = False) -> None:
        super().__init__(text)
        self.text = text
        self.code = code
        self.reason = reason
        self.answered = answered


class MeshUnreachable(CommandError):
    """A failure to reach the mesh: nothing answers at the endpoint, or the answer is not that of a mesh."""

    def __init__(self, text: str) -> None:
        super().__init__(text, code=Exit.UNREACHABLE, reason="UNREACHABLE")


class MeshRefusal(CommandError):
    """A request that the mesh answered with an error."""

    def __init__(self, text: str, *, reason: str, retry_after: float | None = None) -> None:
        if retry_after is not None:
            text = f"{text} (try again in {retry_after:g} s)"
        super().__init__(text, code=of_reason(reason), reason=reason)


def of_reason(name: str) -> Exit:
    """Returns the exit code for the name of a `Reason`, or FAILED for a name that this version does not know."""
    reason = Reason.__members__.get(name)
    if reason is None:
        return Exit.FAILED
    return _OF_REASON.get(reason, Exit.TRY_AGAIN if reason.retry else Exit.FAILED)


def of_mesh_error(error: MeshError) -> CommandError:
    """Converts a MeshError raised in this process to an error of the command line."""
    return MeshRefusal(error.text, reason=error.reason.name, retry_after=error.retry_after)
