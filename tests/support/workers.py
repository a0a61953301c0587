"""One or more router workers in the test's process, fed by a real mirror of a real etcd."""

import functools
import os
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from mesh.etcd import Etcd
from mesh.options.etcdsettings import EtcdSettings
from mesh.process.tasks import Tasks
from mesh.schema.keys import Keys
from mesh.telemetry import metrics
from mesh.wire.call import Header
from mesh.wire.client import Pool, Reply
from router.process import duties, sockets
from router.process.worker import WorkerProcess
from router.settings import RouterSettings
from router.state.feed.following import Following
from router.state.feed.server import FeedServer
from tests.support.fakepod import INFER, request
from tests.support.waiting import until


@dataclass
class Workers:
    processes: list[WorkerProcess]
    pools: list[Pool]
    feed: FeedServer

    async def infer(
        self, model_id: str, worker: int = 0, *, timeout: float = 20.0, headers: list[Header] | None = None
    ) -> Reply:
        """Makes a V2 call through a worker's socket, as Envoy would."""
        return await self.pools[worker].call(INFER, headers or [], request(model_id), timeout=timeout)

    async def sees(self, *pods: str) -> None:
        """Waits until every worker sees these pods as healthy."""

        def all_see() -> bool:
            views = [process.view.pods for process in self.processes]
            return all(set(pods) <= {pod.name for pod in view.values() if not pod.suspect} for view in views)

        await until(all_see, interval=0.005, why=f"all workers see {pods}")


@asynccontextmanager
async def workers(etcd_settings: EtcdSettings, keys: Keys, count: int = 1, **more: object) -> AsyncIterator[Workers]:
    """Starts workers, waits until they are ready, and stops them at the end. `more` contains further settings."""
    with tempfile.TemporaryDirectory(prefix="mesh-", dir="/tmp") as folder:
        settings = RouterSettings("test", base=keys.base, run_dir=folder, etcd=etcd_settings, workers=count, drain=1.0)
        settings = replace(settings, **more)  # type: ignore[arg-type]
        Path(folder).chmod(0o700)
        etcd = Etcd(etcd_settings)

        async def merged() -> metrics.Snapshot:
            return metrics.merge(await feed.snapshots())

        tasks = Tasks()
        feed = FeedServer(merged, wanted=lambda range: following.want(range))
        following = Following(
            etcd, keys, readers={}, apply=feed.apply, run=functools.partial(tasks.run, duties.FOLLOW_ETCD)
        )
        following.begin()
        await feed.start(settings.feed)
        listening = [
            sockets.Sockets({kind: settings.socket(kind, index) for kind in sockets.KINDS}) for index in range(count)
        ]
        processes = [
            WorkerProcess(settings, index, [os.dup(descriptor) for descriptor in one.descriptors])
            for index, one in enumerate(listening)
        ]
        pools = [Pool(f"unix:{settings.socket('grpc', index)}", max_connections=1000) for index in range(count)]
        try:
            for process in processes:
                await process.start()
            await until(
                lambda: len(feed.ready()) == count and not any(feed.ready().values()),
                interval=0.005,
                why="every worker is ready",
            )
            yield Workers(processes, pools, feed)
        finally:
            for pool in pools:
                pool.close()
            for process in processes:
                await process.stop()
            await tasks.close()
            await feed.close()
            await etcd.close()
            for one in listening:
                one.close()
