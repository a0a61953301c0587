"""kubectl and helm with one identity, and waits for their effects.

A `Kube` is one identity in one namespace. It waits with `kubectl wait` or by polling a condition. The error of a wait
that fails shows the objects, the events and the logs of the pods.
"""

import asyncio
import base64
import contextlib
import json
import os
import re
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploy.cluster import layout
from tests.support.waiting import until

ROOT = Path(__file__).parents[2]
"""The project's root, the current folder for the docs' commands."""

_PORT = re.compile(r"Forwarding from 127\.0\.0\.1:(\d+)")


class KubeError(AssertionError):
    """A command that failed, with its output as text."""


@dataclass(frozen=True, slots=True)
class Kube:
    """One identity's access to the cluster: a kubeconfig and a namespace."""

    kubeconfig: Path
    namespace: str = "default"

    def within(self, namespace: str) -> "Kube":
        return Kube(self.kubeconfig, namespace)

    @property
    def environment(self) -> dict[str, str]:
        """The environment in which kubectl and helm are found and use this cluster by default."""
        # Nothing of the machine's own configuration: neither its plugins nor its repositories.
        path, home = f"{layout.BIN}:{os.environ['PATH']}", str(layout.HOME)
        return {"PATH": path, "HOME": home, "KUBECONFIG": str(self.kubeconfig)}

    def kubectl(self, *argv: str, given: str | None = None, timeout: float = 60.0) -> str:
        """Runs kubectl and returns its output. `given` is its standard input."""
        return self._run("kubectl", *argv, given=given, timeout=timeout)

    def shell(self, line: str, *, folder: Path = ROOT, timeout: float = 420.0) -> str:
        """Runs a command line in a folder, as a user who has this kubeconfig and the program `mesh`, and returns its
        output."""
        argv = ["bash", "-o", "pipefail", "-c", line]
        path = f"{Path(sys.executable).parent}:{self.environment['PATH']}"
        done = subprocess.run(
            argv, cwd=folder, env={**self.environment, "PATH": path}, capture_output=True, text=True, timeout=timeout
        )
        if done.returncode != 0:
            raise KubeError(f"{line}: {done.stderr.strip()}\n{done.stdout.strip()}".rstrip())
        return done.stdout

    def helm(self, *argv: str, timeout: float = 300.0) -> str:
        return self._run("helm", *argv, given=None, timeout=timeout)

    def dry_run(self, *objects: dict[str, Any]) -> list[str]:
        """Lets the API server validate objects as if they were applied, and returns its warnings. Raises KubeError if
        it refuses them."""
        given = json.dumps({"apiVersion": "v1", "kind": "List", "items": objects})
        done = self._done("kubectl", "apply", "--dry-run=server", "--validate=strict", "-f", "-", given=given)
        return [line for line in done.stderr.splitlines() if line.startswith("Warning:")]

    def _run(self, program: str, *argv: str, given: str | None, timeout: float) -> str:
        return self._done(program, *argv, given=given, timeout=timeout).stdout

    def _done(
        self, program: str, *argv: str, given: str | None, timeout: float = 60.0
    ) -> subprocess.CompletedProcess[str]:
        command = [str(layout.BIN / program), f"--kubeconfig={self.kubeconfig}", f"--namespace={self.namespace}", *argv]
        done = subprocess.run(
            command, input=given, env=self.environment, capture_output=True, text=True, timeout=timeout
        )
        if done.returncode != 0:
            raise KubeError(f"{program} {' '.join(argv)}: {done.stderr.strip()}\n{done.stdout.strip()}".rstrip())
        return done

    def get(self, *argv: str) -> dict[str, Any]:
        """Returns the result of `kubectl get` as an object, which may be a List."""
        found: dict[str, Any] = json.loads(self.kubectl("get", *argv, "--output=json"))
        return found

    def apply(self, *objects: dict[str, Any]) -> str:
        """Creates or changes objects."""
        return self.kubectl(
            "apply", "--filename=-", given=json.dumps({"apiVersion": "v1", "kind": "List", "items": list(objects)})
        )

    def can(self, verb: str, resource: str) -> bool:
        """Returns whether this identity may perform the action in this namespace."""
        try:
            return self.kubectl("auth", "can-i", verb, resource).strip() == "yes"
        except KubeError as error:  # a "no" is an exit status of 1 with "no" in the output
            if str(error).endswith("\nno"):
                return False
            raise

    def logs(self, pod: str, container: str = "") -> str:
        return self.kubectl("logs", pod, *([f"--container={container}"] if container else []))

    def exec(self, pod: str, *argv: str, container: str = "") -> str:
        """Runs a program in a pod and returns its output."""
        return self.kubectl("exec", pod, *([f"--container={container}"] if container else []), "--", *argv)

    async def wait(self, what: str, condition: str, timeout: float = 60.0) -> None:
        """Runs `kubectl wait` for an object (or `--selector=...`) and a condition: `condition=Ready`, `jsonpath=...` or
        `delete`."""
        argv = ["wait", *what.split(), f"--for={condition}", f"--timeout={timeout:g}s"]
        try:
            await asyncio.to_thread(self.kubectl, *argv, timeout=timeout + 10.0)
        except KubeError as error:
            raise KubeError(f"{error}\n{self.story()}") from None

    async def until(self, condition: Callable[[], object], why: str, timeout: float = 60.0) -> None:
        """Polls a condition until it is true. A KubeError counts as false, because the object may not exist yet."""

        def holds() -> bool:
            with contextlib.suppress(KubeError):  # the object does not exist yet
                return bool(condition())
            return False

        await until(
            lambda: asyncio.to_thread(holds), timeout=timeout, interval=0.3, why=lambda: f"{why}\n{self.story()}"
        )

    @contextlib.asynccontextmanager
    async def forward(self, target: str, port: int) -> AsyncIterator[int]:
        """Forwards a local port to a port of a pod or a service (`service/mesh`)."""
        child = await asyncio.create_subprocess_exec(
            str(layout.BIN / "kubectl"),
            f"--kubeconfig={self.kubeconfig}",
            f"--namespace={self.namespace}",
            "port-forward",
            target,
            f":{port}",
            env=self.environment,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        assert child.stdout is not None
        try:
            async with asyncio.timeout(30.0):
                said = ""
                while (found := _PORT.search(said)) is None:
                    line = await child.stdout.readline()
                    if not line:
                        raise KubeError(f"port-forward {target}: {said.strip()}")
                    said += line.decode()
            yield int(found[1])
        finally:
            with contextlib.suppress(ProcessLookupError):
                child.kill()
            await child.wait()

    def story(self) -> str:
        """Returns what happened in this namespace, for an error message."""
        parts = []
        for argv in (
            ["get", "all", "--output=wide"],
            ["get", "events", "--sort-by=.lastTimestamp"],
        ):
            with contextlib.suppress(KubeError, subprocess.TimeoutExpired):
                parts.append(self.kubectl(*argv))
        with contextlib.suppress(KubeError, subprocess.TimeoutExpired):
            for pod in self.get("pods")["items"]:
                name = pod["metadata"]["name"]
                with contextlib.suppress(KubeError, subprocess.TimeoutExpired):
                    said = self.kubectl("logs", name, "--all-containers", "--prefix", "--tail=30")
                    parts.append(f"--- {name}\n{said}")
        return "\n".join(parts)


def pod(name: str, *containers: dict[str, Any], uid: int | None = None, **spec: Any) -> dict[str, Any]:
    """Returns the manifest of a pod that satisfies Pod Security's `restricted`, with a read-only root and only /tmp
    writable.

    With `uid`, the pod runs as that user and group 0, as on OpenShift, otherwise as the image's user. Each container is
    given by its name, its image and its other fields.
    """
    security: dict[str, Any] = {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}
    if uid is not None:
        security |= {"runAsUser": uid, "runAsGroup": 0}
    common = {
        "imagePullPolicy": "Never",
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
            "readOnlyRootFilesystem": True,
        },
        "volumeMounts": [{"name": "tmp", "mountPath": "/tmp"}],
    }
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "labels": {"app": name}},
        "spec": {
            "automountServiceAccountToken": False,
            "restartPolicy": "Never",
            "securityContext": security,
            "terminationGracePeriodSeconds": 1,
            "containers": [{**common, **container} for container in containers],
            "volumes": [{"name": "tmp", "emptyDir": {}}],
            **spec,
        },
    }


def ready_at(path: str, port: int) -> dict[str, Any]:
    """Returns a readiness probe for a container of a test. Its limits tolerate a slow container on a busy machine,
    which would otherwise leave its Service."""
    return {"httpGet": {"path": path, "port": port}, "periodSeconds": 1, "timeoutSeconds": 10, "failureThreshold": 30}


def secret(name: str, data: Mapping[str, bytes]) -> dict[str, Any]:
    encoded = {key: base64.b64encode(value).decode() for key, value in data.items()}
    return {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": name}, "data": encoded}


def pair(pem: bytes) -> dict[str, bytes]:
    """Returns the data of a Secret with a certificate and its key, from one text with both."""
    certificate, begin, key = pem.partition(b"-----BEGIN PRIVATE KEY-----")
    return {"tls.crt": certificate, "tls.key": begin + key}
