"""One run of the doctor: it checks each area within a time limit, and collects the findings.

An area that cannot be checked is listed as skipped. If the area was named on the command line, a finding says that it
cannot be checked. Every failure becomes a finding, even a bug in this code.
"""

import asyncio
import datetime
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from mesh.cli.doctor import (
    certificates,
    clusterchecks,
    clusterfacts,
    etcdchecks,
    etcdfacts,
    meshchecks,
    meshfacts,
    secretchecks,
)
from mesh.cli.doctor.clusterfacts import ClusterFacts
from mesh.cli.doctor.findings import Area, Finding, Level
from mesh.cli.doctor.kubectl import Kubectl, KubectlError, find
from mesh.cli.trust import Trust
from mesh.options.etcdsettings import EtcdSettings

T = TypeVar("T")

_IN_CLUSTER = frozenset({"kubernetes", "secrets"})  # areas checked through kubectl

PATIENCE = 6
"""Factor from `--timeout` to the time limit of an area, which sends several requests one after the other."""


@dataclass(frozen=True, slots=True)
class ExaminationPlan:
    """The areas to check, and the options. `timeout` and `reading` are in seconds."""

    areas: frozenset[str]
    asked: frozenset[str]  # those of them that were asked for by name
    endpoint: str
    trust: Trust
    etcd: EtcdSettings | None  # None: its endpoints were not given
    etcd_unusable: str  # why the given options cannot be used
    base: str
    install_id: str
    quota: int
    namespace: str
    certificates: Path | None
    storage: Path | None
    timeout: float
    reading: float


@dataclass(slots=True)
class Report:
    """The findings, and the areas that were not checked."""

    findings: list[Finding] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)  # area, and why

    def count(self, level: Level) -> int:
        """Counts the findings of one level."""
        return sum(finding.level is level for finding in self.findings)


class Examination:
    """One run of the doctor. `run` may be called once."""

    def __init__(self, plan: ExaminationPlan) -> None:
        self._plan = plan
        self._now = datetime.datetime.now(datetime.UTC)
        self.report = Report()

    async def run(self) -> Report:
        """Checks all areas of the plan, and returns the report."""
        plan = self._plan
        cluster, etcd, mesh = await asyncio.gather(
            self._bounded("kubernetes", self._cluster()),
            self._bounded("etcd", self._etcd()),
            self._bounded("mesh", self._mesh(), more=plan.reading),
        )
        if cluster is not None:
            if "kubernetes" in plan.areas or cluster.error or not cluster.installed:
                self._judge("kubernetes", lambda: clusterchecks.check(cluster))
            self._judge("secrets", lambda: secretchecks.check(cluster, self._now))
        if etcd is not None:
            self._judge("etcd", lambda: etcdchecks.check(etcd, self._now, install_id=plan.install_id, quota=plan.quota))
        elif "etcd" in plan.areas and plan.etcd is None and not plan.etcd_unusable:
            await self._bounded("etcd", self._etcd_from_inside(cluster))
        if mesh is not None:
            stored = self._stored(cluster)
            self._judge("mesh", lambda: meshchecks.check(mesh, self._now, stored=stored))
        if plan.certificates is not None:
            self._judge("certificates", lambda: self._folder(plan.certificates or Path()))
        return self.report

    # --- asking ---

    async def _cluster(self) -> ClusterFacts | None:
        plan = self._plan
        if plan.areas.isdisjoint(_IN_CLUSTER):
            return None
        asked = not plan.asked.isdisjoint(_IN_CLUSTER) or bool(plan.namespace)
        program = find()
        if not program:
            if asked:
                text = "there is no kubectl on PATH"
                self.report.findings.append(
                    clusterchecks.AREA.fail("reach", text, "install it, or leave out this area")
                )
            else:
                self.report.skipped.append(("kubernetes", "there is no kubectl on PATH"))
            return None
        facts = await clusterfacts.gather(Kubectl(program, plan.namespace, timeout=plan.timeout))
        if asked or (facts.installed and not facts.error):
            return facts
        why = facts.error or f"{facts.nothing}, which is kubectl's current one (use --namespace for another)"
        self.report.skipped.append(("kubernetes", why))
        return None

    async def _etcd(self) -> etcdfacts.EtcdFacts | None:
        plan = self._plan
        if "etcd" in plan.areas and plan.etcd_unusable:
            todo = "correct that option or its file; docs/kubernetes.md describes the Secret"
            self.report.findings.append(etcdchecks.AREA.fail("settings", plan.etcd_unusable, todo))
        if "etcd" not in plan.areas or plan.etcd is None:
            return None
        try:
            return await etcdfacts.gather(plan.etcd, plan.base, timeout=plan.timeout)
        except ValueError as error:
            self.report.findings.append(etcdchecks.AREA.fail("settings", str(error), "check --etcd, --etcd-config"))
            return None

    async def _mesh(self) -> meshfacts.MeshFacts | None:
        plan = self._plan
        if "mesh" not in plan.areas:
            return None
        return await meshfacts.gather(plan.endpoint, plan.trust, timeout=plan.timeout, reading=plan.reading)

    async def _etcd_from_inside(self, cluster: ClusterFacts | None) -> None:
        """Runs the checks of etcd in a router pod, because etcd cannot be reached from outside the cluster."""
        plan = self._plan
        if cluster is None or not cluster.router:
            text = "its endpoints are not given: use --etcd or --etcd-config"
            if "etcd" in plan.asked:
                self.report.findings.append(etcdchecks.AREA.fail("settings", text, "give one of these options"))
            else:
                self.report.skipped.append(("etcd", text))
            return
        command = ["mesh", "doctor", "--only", "etcd", "--json", "--timeout", f"{plan.timeout:g}"]
        kubectl = Kubectl(find(), plan.namespace, timeout=plan.timeout * (PATIENCE - 1))
        try:
            text = await kubectl.text("exec", f"deployment/{cluster.router}", "--", *command, codes=(0, 1))
            found = [
                Finding(
                    Level(str(one["level"]) if one["level"] != "fail" else Level.FAIL.value),
                    str(one["area"]),
                    str(one["check"]),
                    str(one["what"]),
                    str(one["todo"]),
                )
                for one in json.loads(text)["findings"]
            ]
        except (KubectlError, ValueError, KeyError, TypeError) as error:
            why = f"a router pod could not check it ({error}); if you can reach it here, give --etcd or --etcd-config"
            self.report.skipped.append(("etcd", why))
            return
        inside = Area("etcd").ok("inside", f"checked from a pod of {cluster.router}")
        self.report.findings += [inside, *found]

    # --- judging ---

    def _stored(self, cluster: ClusterFacts | None) -> frozenset[str] | None:
        """Returns the keys of the storage Secret, or None if the keys are not known."""
        if self._plan.storage is not None:
            try:
                return meshfacts.stored_keys(self._plan.storage)
            except OSError as error:
                text = f"the storage Secret cannot be read at {self._plan.storage}: {error.strerror or error}"
                self.report.findings.append(meshchecks.AREA.fail("storage", text, "check --storage-config"))
                return None
        if cluster is not None and cluster.secrets is not None:
            return frozenset(cluster.secrets.get(clusterfacts.STORAGE, ()))
        return None

    def _folder(self, folder: Path) -> list[Finding]:
        area = Area("certificates")
        try:
            files = sorted(path for path in folder.iterdir() if path.suffix in (".crt", ".pem", ".cert"))
            renew = "renew it; processes that watch the file use the new one without a restart"
            found = [certificates.pem(area, "expiry", str(path), path.read_bytes(), self._now, renew) for path in files]
        except OSError as error:
            return [area.fail("folder", f"{folder} cannot be read: {error.strerror or error}", "check --certificates")]
        return found or [area.warn("folder", f"{folder} has no .crt or .pem files", "check --certificates")]

    def _judge(self, area: str, check: Callable[[], list[Finding]]) -> None:
        try:
            self.report.findings += check()
        except Exception as error:  # facts of another version, most likely: the other areas still count
            self._broken(area, error)

    async def _bounded(self, area: str, looking: Awaitable[T], *, more: float = 0.0) -> T | None:
        seconds = PATIENCE * self._plan.timeout + more
        try:
            async with asyncio.timeout(seconds):
                return await looking
        except TimeoutError:
            text = f"the check did not end within {seconds:g} s"
            self.report.findings.append(
                Area(area).fail("time", text, "look for a server that hangs, or set a longer --timeout")
            )
        except Exception as error:
            self._broken(area, error)
        return None

    def _broken(self, area: str, error: Exception) -> None:
        text = f"the check itself failed: {type(error).__name__}: {error}"
        self.report.findings.append(
            Area(area).warn("doctor", text, "report this error, with the output of `mesh version`")
        )
