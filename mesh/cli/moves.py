"""Moving an alias by a command: the request, the wait for the end of the move, and the answer.

The mesh moves an alias by itself, so a command that ends early, by Ctrl-C or its time limit, does not stop the move.
The commands that create or move aliases (`aliases`, `versions`) share this module.
"""

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mesh.cli import aliasview, output, serving
from mesh.cli.client import Client, model_path
from mesh.cli.exits import CommandError, Exit, MeshRefusal
from mesh.schema.modelstatus import ModelStatus, VModelStatus
from mesh.statuses import Reason

_LOOK = 0.3  # seconds between two requests for the state of a move


@dataclass(frozen=True, slots=True)
class Patience:
    """A command's options for a move: `wait` for its end or not, the time limit, and the output as JSON or text."""

    wait: bool
    timeout: float  # seconds
    as_json: bool = False


async def carry_out(
    client: Client,
    alias: str,
    body: Mapping[str, Any],
    patience: Patience,
    *,
    method: str = "PUT",
    rest: str = "",
    load: bool = False,
) -> None:
    """Sends the request to create or change an alias, waits for the end of its move, and prints the alias.

    With `load`, also waits until the model that serves calls is loaded, because a new alias points at its model without
    a move. Raises CommandError if the model could not be loaded, if another request changed the target, or after the
    timeout.
    """
    end = time.monotonic() + patience.timeout
    answer = await client.request(method, aliasview.alias_path(alias, rest), body=body)
    target = str(answer.get("target", ""))
    going_on = f"moving {alias} to {target}"
    if patience.wait:
        try:
            answer = await _followed(client, alias, target, answer, end)
            if load and answer.get("status") == VModelStatus.DEFINED:
                going_on = f"loading {answer.get('active')}"
                answer = await _loaded(client, alias, answer, end)
        except asyncio.CancelledError:
            text = (
                f"only this command ends, and the mesh continues {going_on}: `mesh alias show {alias}` shows the "
                "progress"
            )
            output.remarks().print(output.plain(text), soft_wrap=True)
            raise
    aliasview.show(answer, as_json=patience.as_json)
    if (error := _failure(alias, target, answer, patience, load=load)) is not None:
        raise error


async def _followed(client: Client, alias: str, target: str, answer: dict[str, Any], end: float) -> dict[str, Any]:
    """Returns the alias once its move has completed or failed, another request has changed the target, or the time
    limit is reached."""
    with _progress() as say:
        while _moves(answer, target) and time.monotonic() < end:
            say(*await _stage(client, alias, answer))
            await asyncio.sleep(_LOOK)
            answer = await client.get(aliasview.alias_path(alias))
    return answer


def _moves(answer: Mapping[str, Any], target: str) -> bool:
    return answer.get("status") == VModelStatus.TRANSITIONING and answer.get("target") == target


async def _loaded(client: Client, alias: str, answer: dict[str, Any], end: float) -> dict[str, Any]:
    """Loads the model that serves calls, and then returns the alias."""
    active = str(answer.get("active", ""))
    with _progress() as say, contextlib.suppress(MeshRefusal):  # the status of the alias's models has the error
        stage = f"{alias}: loading {active}"
        say(stage, stage)
        left = max(1.0, end - time.monotonic())
        await client.request("POST", model_path(active, "/load"), body={"sync": True}, timeout=left)
    return await client.get(aliasview.alias_path(alias))


async def _stage(client: Client, alias: str, answer: Mapping[str, Any]) -> tuple[str, str]:
    """Returns two texts that say what a move is waiting for: a short one, and a long one with the progress of loads."""
    active, target = answer.get("active"), answer.get("target")
    short = f"{alias}: calls go to {active} until {target} is loaded"
    try:
        copies = (await client.get(model_path(str(target)))).get("copies") or []
    except MeshRefusal:  # the state is shown again a moment later
        copies = []
    loads = [
        f"{copy.get('pod')}: {copy.get('status')}"
        + serving.queued(copy.get("load"))
        + serving.pulling(copy.get("pull"))
        for copy in copies
    ]
    return short, f"{short}; {', '.join(loads)}" if loads else short


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[str, str], None]]:
    """Yields a function that shows the two texts of `_stage`. On a terminal, the long text is updated in place.
    Otherwise each new short text is printed as a line."""
    screen = output.remarks()
    said = ""

    def line(short: str, _: str) -> None:
        nonlocal said
        if short != said:
            said = short
            screen.print(output.plain(short), soft_wrap=True)

    if not screen.is_terminal:
        yield line
        return
    with screen.status("") as live:
        yield lambda _, detailed: live.update(output.plain(detailed))


def _failure(
    alias: str, target: str, answer: Mapping[str, Any], patience: Patience, *, load: bool
) -> CommandError | None:
    """Returns the error that ends the command, or None if the move succeeded or the command does not wait."""
    status, active = answer.get("status"), answer.get("active")
    if answer.get("target") != target:
        text = f"{alias} now moves to {answer.get('target')}: another request has changed it"
        return CommandError(text, reason=Reason.CONFLICT.name, answered=True)
    if status == VModelStatus.TRANSITION_FAILED:
        text = f"calls of {alias} still go to {active}, because {target} could not be loaded: {aliasview.why(answer)}. "
        text += f"The mesh tries again; `mesh alias set {alias} {active}` cancels the move"
        return CommandError(text, code=Exit.LOAD_FAILED, reason=Reason.LOAD_FAILED.name, answered=True)
    if not patience.wait:
        return None
    if status == VModelStatus.TRANSITIONING:
        text = (
            f"{alias} has not moved to {target} within {patience.timeout:g} s; the mesh continues the move, and "
            f"`mesh alias show {alias}` shows the progress"
        )
        return CommandError(text, code=Exit.TRY_AGAIN, reason=Reason.NOT_IN_TIME.name, answered=True)
    model: Mapping[str, Any] = next((one for one in answer.get("models") or () if one.get("id") == active), {})
    if load and model.get("status") != ModelStatus.LOADED:
        text = f"{alias} is set, but {active} is not loaded: {aliasview.why(answer) or model.get('status')}"
        return CommandError(text, code=Exit.LOAD_FAILED, reason=Reason.LOAD_FAILED.name, answered=True)
    return None
