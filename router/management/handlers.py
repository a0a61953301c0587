"""The handlers of management, assembled for all transports."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from mesh.etcd import Etcd
from mesh.schema.keys import Keys
from router.fencing.tombstones import Tombstones
from router.fencing.withdrawal import Withdrawal
from router.loads.agents import Agent
from router.loads.coldstart import ColdStart
from router.management.creation import Creation
from router.management.inspection import Inspector
from router.management.loading import Loading
from router.management.pods import Pods
from router.management.registration import Registrar
from router.management.status import Reporter
from router.management.tuning import Tuning
from router.management.vmodels import Listen, VModels
from router.settings import RouterSettings
from router.state.registry import Registry
from router.state.view import View
from router.vmodels.store import Note, VModelStore


@dataclass(frozen=True, slots=True)
class Management:
    """The management handlers of one worker, one for each kind of thing."""

    registration: Registrar
    loading: Loading
    status: Reporter
    inspection: Inspector
    pods: Pods
    tuning: Tuning
    vmodels: VModels

    @classmethod
    def of(
        cls,
        *,
        etcd: Etcd,
        keys: Keys,
        registry: Registry,
        view: View,
        coldstart: ColdStart,
        agents: Agent,
        tombstones: Tombstones,
        settings: RouterSettings,
        listen: Listen = lambda _: None,
        note: Note = lambda *_: None,
        wall: Callable[[], int] = lambda: int(time.time() * 1000),
    ) -> "Management":
        """Creates the handlers. `listen` reports changes of vmodels, so that waits for a move end at once. `note` is
        called with each vmodel that was read or written. `wall` returns milliseconds since the epoch."""
        status = Reporter(
            etcd=etcd, keys=keys, view=view, coldstart=coldstart, failure_expiry=settings.failure_expiry, wall=wall
        )
        loading = Loading(registry=registry, view=view, coldstart=coldstart, status=status, wall=wall)
        withdrawal = Withdrawal(
            etcd=etcd,
            keys=keys,
            registry=registry,
            view=view,
            agents=agents,
            tombstones=tombstones,
            wait=settings.unload_wait,
        )
        creation = Creation(
            etcd=etcd,
            keys=keys,
            registry=registry,
            withdrawal=withdrawal,
            tombstones=tombstones,
            wait=settings.unload_wait,
            reregister_after=settings.reregister_after,
        )
        store = VModelStore(
            etcd=etcd, keys=keys, registry=registry, withdrawal=withdrawal, tombstones=tombstones, note=note
        )
        registration = Registrar(
            etcd=etcd,
            keys=keys,
            registry=registry,
            creation=creation,
            withdrawal=withdrawal,
            loading=loading,
            status=status,
            wall=wall,
        )
        return cls(
            registration,
            loading,
            status,
            Inspector(view=view, choosing=coldstart.choosing, agents=agents, status=status),
            Pods(
                etcd=etcd,
                keys=keys,
                view=view,
                agents=agents,
                tombstones=tombstones,
                reregister_after=settings.reregister_after,
            ),
            Tuning(etcd, keys),
            VModels(
                store=store,
                keys=keys,
                registry=registry,
                creation=creation,
                loading=loading,
                status=status,
                listen=listen,
                wall=wall,
                default_owner=settings.default_vmodel_owner,
            ),
        )
