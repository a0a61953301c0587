"""Requests to Kubernetes through `kubectl`, which is already configured with the admin's clusters and logins."""

import asyncio
import contextlib
import json
import shutil
from collections.abc import Sequence
from typing import Any

_SHOWN = 200  # characters of unexpected output


class KubectlError(Exception):
    """A failed request, with kubectl's own error in one line."""


def find() -> str:
    """Returns the path of kubectl; "" if it is not installed."""
    return shutil.which("kubectl") or ""


class Kubectl:
    """kubectl for one namespace. `timeout` limits one call, in seconds."""

    def __init__(self, program: str, namespace: str, *, timeout: float) -> None:
        self.namespace = namespace
        self._program = program
        self._timeout = timeout

    async def text(self, *arguments: str, stdin: bytes | None = None, codes: Sequence[int] = (0,)) -> str:
        """Runs a command and returns its output. Raises KubectlError."""
        options = [f"--namespace={self.namespace}"] if self.namespace else []
        try:
            child = await asyncio.create_subprocess_exec(
                self._program,
                *options,
                *arguments,
                stdin=asyncio.subprocess.PIPE if stdin is not None else asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
            )
        except OSError as error:
            raise KubectlError(f"{self._program} cannot be started: {error.strerror or error}") from error
        try:
            async with asyncio.timeout(self._timeout):
                out, err = await child.communicate(stdin)
        except TimeoutError as error:
            raise KubectlError(f"kubectl {arguments[0]} did not end within {self._timeout:g} s") from error
        finally:
            if child.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    child.kill()
                await child.wait()
        if child.returncode not in codes:
            ended = f"kubectl {arguments[0]} ended with status {child.returncode} and printed no error"
            lines = err.decode(errors="replace").strip().splitlines() or [ended]
            raise KubectlError(lines[-1].removeprefix("error: "))
        return out.decode(errors="replace")

    async def items(self, *arguments: str, stdin: bytes | None = None) -> list[dict[str, Any]]:
        """Runs a command and returns its objects. Raises KubectlError."""
        seconds = max(1, int(self._timeout))
        text = await self.text(*arguments, "--output=json", f"--request-timeout={seconds}s", stdin=stdin)
        try:
            return parse(text)
        except ValueError as error:
            command, shown = " ".join(("kubectl", *arguments)), " ".join(text.split())[:_SHOWN]
            raise KubectlError(f"`{command}` should print JSON, but printed: {shown}") from error


def parse(text: str) -> list[dict[str, Any]]:
    """Parses kubectl's output: a list of objects, one object, several in sequence, or nothing. Raises ValueError if it
    is not JSON."""
    decoder, place = json.JSONDecoder(), 0
    found: list[Any] = []
    while text[place:].strip():
        place += len(text[place:]) - len(text[place:].lstrip())
        document, place = decoder.raw_decode(text, place)
        if isinstance(document, dict):
            inside = document.get("items")
            found += inside if isinstance(inside, list) else [document]
    return [one for one in found if isinstance(one, dict)]
