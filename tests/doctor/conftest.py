"""Fixtures that run `mesh doctor` as an admin does, without this machine's own Kubernetes configuration."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from mesh.cli.app import build


@dataclass(frozen=True)
class Visit:
    """The result of one run of `mesh doctor`."""

    code: int
    findings: list[dict[str, str]]
    skipped: list[dict[str, str]]

    def said(self, level: str, area: str, check: str) -> str:
        """Returns the matching findings with their remedies as one text. Fails if there are none."""
        found = [
            f"{one['what']} > {one['todo']}"
            for one in self.findings
            if (one["level"], one["area"], one["check"]) == (level, area, check)
        ]
        assert found, f"no {level} about {check} of {area}:\n" + "\n".join(map(str, self.findings))
        return "\n".join(found)

    @property
    def bad(self) -> list[tuple[str, str]]:
        """The area and check of each finding that is not ok."""
        return [(one["area"], one["check"]) for one in self.findings if one["level"] != "ok"]


@pytest.fixture
def doctor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Visit]:
    """Returns a function that runs `mesh doctor --json` with arguments."""
    for name in ("MESH_ETCD", "MESH_ETCD_CONFIG", "MESH_ENDPOINT", "MESH_INTERNAL_TLS", "MESH_STORAGE_CONFIG"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    app = build()

    def visit(*arguments: str) -> Visit:
        result = CliRunner().invoke(app, ["doctor", "--json", *arguments])
        assert result.exit_code in (0, 1), result.output
        answer: dict[str, Any] = json.loads(result.stdout)
        assert (result.exit_code == 1) == any(one["level"] == "fail" for one in answer["findings"])
        return Visit(result.exit_code, answer["findings"], answer["skipped"])

    return visit
