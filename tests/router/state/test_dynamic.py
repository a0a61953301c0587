"""Settings that change while the mesh runs, on a real etcd."""

import functools

import pytest

from mesh.process.tasks import Tasks
from mesh.statuses import MeshError, Reason
from router.management.tuning import Tuning
from router.process import duties
from router.state.dynamic import TYPE_CONSTRAINTS, TYPE_LIMITS, Dynamic
from router.state.feed import ranges
from router.state.feed.following import Following
from tests.support.waiting import until


@pytest.fixture
async def dynamic(etcd, keys):
    made = Dynamic(keys)
    tasks = Tasks()
    following = Following(
        etcd,
        keys,
        readers={ranges.CONFIG: made},
        apply=lambda range, change: None,
        run=functools.partial(tasks.run, duties.FOLLOW_ETCD),
    )
    following.begin()
    yield made
    await tasks.close()


async def test_what_is_written_holds_everywhere_a_moment_later(dynamic, etcd, keys):
    """A setting takes effect when the follower of etcd delivers it. A deleted setting loses its effect."""
    tuning = Tuning(etcd, keys)
    await tuning.write(TYPE_CONSTRAINTS, '{"big": {"required": ["gpu"]}}')
    await tuning.write(TYPE_LIMITS, '{"big": {"max": 2}, "_default": {"min": 1}}')
    await until(lambda: dynamic.current.limits.types)
    await until(lambda: dynamic.current.constraints.types)
    assert not dynamic.current.constraints.allows("big", frozenset({"cpu"}))
    assert dynamic.current.limits.of("big").maximum == 2
    assert dynamic.current.limits.of("other").minimum == 1
    assert await tuning.read() == {
        TYPE_CONSTRAINTS: '{"big": {"required": ["gpu"]}}',
        TYPE_LIMITS: '{"big": {"max": 2}, "_default": {"min": 1}}',
    }
    await tuning.write(TYPE_CONSTRAINTS, "")
    await until(lambda: not dynamic.current.constraints.types)
    assert dynamic.current.limits.types


async def test_nonsense_is_refused_and_changes_nothing(dynamic, etcd, keys):
    """An invalid setting is refused. If another program writes one to etcd, the setting before it stays in effect."""
    tuning = Tuning(etcd, keys)
    await tuning.write(TYPE_LIMITS, '{"a": {"max": 3}}')
    await until(lambda: dynamic.current.limits.types)
    for name, text in (
        (TYPE_LIMITS, "{"),
        (TYPE_LIMITS, '{"a": {"max": 0}}'),
        (TYPE_LIMITS, '{"a": {"most": 1}}'),
        (TYPE_CONSTRAINTS, '{"a": []}'),
        ("other", "{}"),
    ):
        with pytest.raises(MeshError) as caught:
            await tuning.write(name, text)
        assert caught.value.reason is Reason.BAD_REQUEST
    await etcd.put(keys.setting(TYPE_LIMITS), b"\xff{")
    await tuning.write(TYPE_CONSTRAINTS, '{"b": {"preferred": ["x"]}}')
    await until(lambda: dynamic.current.constraints.types)
    assert dynamic.current.limits.of("a").maximum == 3
