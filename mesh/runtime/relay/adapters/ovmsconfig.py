"""The configuration file of OpenVINO Model Server, and the changes that OVMS reads from it.

All changes that are wanted within `WAIT` are written together, and OVMS is told once to read the file. OVMS answers
with the state of every model. If it answers with an error, as when one model fails, this module asks for the states.
"""

import asyncio
import http.client
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mesh.modelservers import ovms
from mesh.options.values import parse_address
from mesh.statuses import MeshError, Reason

WAIT = 0.1
"""Seconds for further changes to join the first one: ModelMesh's."""

_MOST = 64 << 20  # bytes of an answer
_SHOWN = 500  # characters of an error
_TIMEOUT = 30.0  # seconds for a reload without another limit: ModelMesh's


@dataclass(frozen=True, slots=True)
class ModelState:
    """The state of a model, as OVMS reports it."""

    available: bool
    why: str  # if it is not


class OvmsRest:
    """The REST port of one OVMS. `timeout` is in seconds."""

    def __init__(self, address: str, *, timeout: float | None) -> None:
        self._host, self._port = parse_address(address)
        self._timeout = timeout or _TIMEOUT

    async def reload(self) -> dict[str, ModelState]:
        """Has OVMS read its file, and returns the states of all models. Raises MeshError."""
        return await asyncio.to_thread(self._reload)

    async def states(self, timeout: float) -> dict[str, ModelState]:
        """Returns the states of all models. Raises MeshError."""
        return _states(await asyncio.to_thread(self._ask, "GET", "/v1/config", timeout))

    def _reload(self) -> dict[str, ModelState]:
        status, body = self._ask("POST", "/v1/config/reload", self._timeout)
        if status not in (200, 201):
            said = body
            status, body = self._ask("GET", "/v1/config", self._timeout)
            if status != 200:
                raise MeshError(Reason.LOAD_FAILED, f"OVMS cannot read its configuration: {_error(said)}")
        return _states((status, body))

    def _ask(self, method: str, path: str, timeout: float) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection(self._host, self._port, timeout=timeout)
        try:
            connection.request(method, path)
            response = connection.getresponse()
            return response.status, response.read(_MOST)
        except (OSError, http.client.HTTPException) as error:
            text = f"OVMS does not answer on its REST port {self._host}:{self._port} (--server-rest): {error}"
            raise MeshError(Reason.UNAVAILABLE, text) from error
        finally:
            connection.close()


class Reloads:
    """The models that one OVMS should have. For use in one event loop."""

    def __init__(self, root: Path, rest: OvmsRest) -> None:
        self._file = root / "models" / ovms.FILE
        self._rest = rest
        self._wanted: dict[str, str] = {}  # base paths by name
        self._next: asyncio.Future[dict[str, ModelState]] | None = None  # the change that is not written yet
        self._stale = False  # the last change has failed, so OVMS may still have models that it should have dropped
        self._one = asyncio.Lock()  # one change at a time
        self._tasks: set[asyncio.Task[None]] = set()
        ovms.prepare(self._file.parent)

    def resume(self) -> None:
        """Takes over the models that the file lists, or none if the file cannot be read."""
        try:
            found = json.loads(self._file.read_bytes())["model_config_list"]
            self._wanted = {str(one["config"]["name"]): str(one["config"]["base_path"]) for one in found}
        except (OSError, ValueError, KeyError, TypeError):
            self._wanted = {}

    async def clear(self, timeout: float) -> None:
        """Has OVMS drop all models. Raises MeshError."""
        await self._rest.states(timeout)  # whether it answers at all
        self._wanted.clear()
        await self._changed()

    async def put(self, name: str, base: Path) -> ModelState:
        """Has OVMS load a model, and returns its state. Raises MeshError, with CANCELLED if the model was dropped
        meanwhile."""
        self._wanted[name] = str(base)
        states = await self._changed()
        if self._wanted.get(name) != str(base):
            raise MeshError(Reason.CANCELLED, "the model was unloaded while it was being loaded")
        return states.get(name, ModelState(False, "it reports no state for the model"))

    async def drop(self, name: str) -> None:
        """Has OVMS drop a model. Raises MeshError."""
        if self._wanted.pop(name, None) is not None or self._stale:
            await self._changed()

    async def _changed(self) -> dict[str, ModelState]:
        """Returns the states after the next change, which continues if this caller stops waiting."""
        if self._next is None:
            self._next = asyncio.get_running_loop().create_future()
            task = asyncio.create_task(self._change(self._next))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        return await asyncio.shield(self._next)

    async def _change(self, done: asyncio.Future[dict[str, ModelState]]) -> None:
        await asyncio.sleep(WAIT)
        async with self._one:
            self._next, self._stale = None, True
            try:
                await asyncio.to_thread(ovms.write, self._file, dict(self._wanted))
                states = await self._rest.reload()
                self._stale = False
                done.set_result(states)
            except OSError as error:
                text = f"the configuration of OVMS cannot be written: {error.strerror}"
                done.set_exception(MeshError(Reason.LOAD_FAILED, text))
            except Exception as error:  # raised to the callers, who would otherwise wait without end
                done.set_exception(error)
        done.exception()  # taken, even if all callers have gone


def _states(answer: tuple[int, bytes]) -> dict[str, ModelState]:
    """Returns the states in an answer: for each model, that of the first version."""
    status, body = answer
    try:
        found = json.loads(body)
        return {str(name): _state(told["model_version_status"]) for name, told in found.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise MeshError(
            Reason.UNAVAILABLE,
            f"OVMS's answer (HTTP {status}) lacks the states of models: {_error(body) or 'it is empty'}",
        ) from error


def _state(versions: list[dict[str, Any]]) -> ModelState:
    if not versions:
        return ModelState(False, "it found no version of the model")
    state, told = str(versions[0]["state"]), versions[0].get("status") or {}
    said = (state, told.get("error_code"), told.get("error_message"))
    return ModelState(state == "AVAILABLE", ": ".join(str(one) for one in said if one))


def _error(body: bytes) -> str:
    try:
        return str(json.loads(body)["error"])[:_SHOWN]
    except (ValueError, KeyError, TypeError):
        return body[:_SHOWN].decode(errors="replace")
