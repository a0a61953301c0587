"""Visits of `mesh doctor` to an installed mesh: its findings, and waits until it reports the expected findings or
none."""

import asyncio
import json
import shlex
import sys
from collections.abc import Collection
from pathlib import Path

from tests.support.cluster import Kube
from tests.support.installed import Installed
from tests.support.waiting import until

Expected = tuple[str, ...]
"""Level, area and check of a finding, and words of its text or its advice."""


class Visits:
    """The findings of `mesh doctor`, which the namespace's admin runs by default."""

    def __init__(self, mesh: Installed, *options: str, kube: Kube | None = None) -> None:
        """Prepares visits. `kube` is another identity that runs the doctor, and that does not reach the endpoint."""
        self._mesh = mesh
        self._kube = kube
        self._argv = ("doctor", "--json", "--namespace", mesh.kube.namespace, "--timeout", "8", *options)
        self.findings: list[dict[str, str]] = []

    async def visit(self) -> None:
        """Runs the doctor once more, and keeps its findings."""
        if self._kube is None:
            said = await self._mesh.mesh(*self._argv, codes=(0, 1))
        else:
            command = shlex.join([str(Path(sys.executable).with_name("mesh")), *self._argv])
            said = await asyncio.to_thread(self._kube.shell, f"{command} || test $? = 1")
        self.findings = json.loads(said)["findings"]

    def found(self, level: str, area: str, check: str, *words: str) -> bool:
        """Returns whether the last visit has a finding with all of the words."""
        return any(
            (one["level"], one["area"], one["check"]) == (level, area, check)
            and all(word in f"{one['what']} > {one['todo']}" for word in words)
            for one in self.findings
        )

    @property
    def bad(self) -> list[dict[str, str]]:
        """All findings other than `ok`."""
        return [one for one in self.findings if one["level"] != "ok"]

    async def until_said(self, expected: Collection[Expected]) -> None:
        """Visits until all expected findings are reported, or, if none are expected, until all findings are `ok`."""

        async def said() -> bool:
            await self.visit()
            return all(self.found(*one) for one in expected) if expected else not self.bad

        def why() -> str:
            return "\n".join(map(str, [f"the doctor says {expected or 'that all is well'}, not", *self.bad]))

        await until(said, timeout=120.0, interval=0.5, why=why)
