"""Faults in the duties of real processes, injected through a module that Python imports at its start.

PYTHONPATH must contain this folder, and MESH_SABOTAGE must name a folder of orders, in which each process looks for
orders to its duties. An order is a file named `PROCESS duty` that contains `raise`, `cancel`, `end` or `hang`. The duty
that obeys the order removes the file. Nothing of this is in the product itself.
"""

import importlib.abc
import importlib.util
import os
import sys

MODULE = "mesh.process.tasks"
PROCESSES = {
    "router": "router",
    "router.process.worker": "worker",
    "mesh.runtime": "agent",
    "mesh.runtime.server": "server",
    "mesh.runtime.relay": "relay",
    "tests.support.twin": "server",
    "mesh": "up",
}


def _process():
    argv = sys.orig_argv
    return PROCESSES.get(argv[argv.index("-m") + 1], "") if "-m" in argv else ""


def _sabotage(tasks, folder, process):
    import asyncio

    run = tasks.Tasks.run

    async def order(name):
        path = os.path.join(folder, f"{process} {name}")
        while True:
            if os.path.exists(path):
                with open(path) as file:
                    told = file.read()
                os.unlink(path)
                return told
            await asyncio.sleep(0.05)

    def sabotaged(self, duty, work, which=""):
        async def obedient():
            working = asyncio.ensure_future(work())
            waiting = asyncio.ensure_future(order(f"{duty.name} {which}".rstrip()))
            try:
                await asyncio.wait({working, waiting}, return_when=asyncio.FIRST_COMPLETED)
            except asyncio.CancelledError:
                working.cancel()
                await asyncio.wait({working})
                raise
            finally:
                waiting.cancel()
            if working.done():
                working.result()
                return
            working.cancel()
            await asyncio.wait({working})
            told = waiting.result()
            if told == "raise":
                raise RuntimeError("sabotaged")
            if told == "cancel":
                raise asyncio.CancelledError
            if told == "hang":
                await asyncio.Event().wait()

        return run(self, duty, obedient, which)

    tasks.Tasks.run = sabotaged


class _Finder(importlib.abc.MetaPathFinder):
    """A finder that patches the module of duties when the module is imported."""

    def find_spec(self, name, path=None, target=None):
        if name != MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def executed(module):
            execute(module)
            _sabotage(module, os.environ["MESH_SABOTAGE"], _process())

        spec.loader.exec_module = executed
        return spec


if "MESH_SABOTAGE" in os.environ and _process():
    sys.meta_path.insert(0, _Finder())
