import asyncio
import dataclasses
import gzip
import itertools
import json
import types

import pytest
from hypothesis import given
from hypothesis import strategies as st
from yarl import URL

from mesh.statuses import MeshError, Reason
from mesh.telemetry import metrics
from placement.copies import CopyLimits
from router.management import statistics
from router.rest import bulk
from router.rest import management as routes
from tests.support.waiting import until

IMPORT = "/mesh/v1/models:import"
MODEL = {"type": "onnx", "path": "/a", "key": "k"}


@pytest.fixture
def path(served):
    return lambda rest: URL(f"http://127.0.0.1:{served}/mesh/v1/{rest}", encoded=True)


async def test_registering_is_201_then_200_then_409(http, path, worker):
    async with http.put(path("models/a%2Fb"), json=MODEL) as answer:
        assert answer.status == 201
        assert await answer.json() == {
            "id": "a/b",
            **MODEL,
            "status": "LOADED",
            "errors": ["an old failure"],
            "copies": [{"pod": "pod-0", "status": "LOADED", "time_ms": 1, "bytes": 2, "generation": 0, "digest": ""}],
            "digest": "",
            "digest_ms": 0,
            "generation": 0,
            "reload": None,
            "host_bytes": 0,
            "device_bytes": 0,
            "load_ms": 0,
            "references": 0,
            "quarantined": False,
            "killed": [],
        }
    async with http.put(path("models/a%2Fb"), json={**MODEL, "load": True, "sync": True}) as answer:
        assert answer.status == 200
    assert worker.management.loaded == [("a/b", True)]
    async with http.put(path("models/a%2Fb"), json={**MODEL, "path": "/other"}) as answer:
        assert (answer.status, (await answer.json())["reason"]) == (409, "CONFLICT")
    assert list(worker.management.models) == ["a/b"]


async def test_a_conflict_names_what_differs_and_the_ways_out(http, path, worker):
    """The error for a conflicting registration lists the attributes that differ, without secrets, and the ways to
    change them."""
    async with http.put(path("models/m"), json={**MODEL, "key": '{"secret_access_key": "s"}'}) as answer:
        assert answer.status == 201
    async with http.put(path("models/m"), json={**MODEL, "path": "/b", "key": "k", "sha256": "a" * 64}) as answer:
        document = await answer.json()
    assert document["details"] == {"differs": "path,key,sha256"}
    assert document["error"].startswith(f"model m is registered with path {MODEL['path']!r}, not '/b', key ")
    assert "sha256 none, not 'aaaa" in document["error"]
    assert '"s"' not in document["error"]
    for way in ("mesh register m FILE --version N", "reload it", "unregister it first"):
        assert way in document["error"]


@pytest.mark.parametrize(
    ("rest", "names", "hint"),
    [
        ("models/m", {"version": 8}, "; PUT /mesh/v1/aliases/NAME registers versions"),
        ("models/m", {"labels": []}, "; labels belong to pods"),
        ("models/m", {"nam": 1, "id": "m"}, ""),
    ],
)
async def test_unknown_attributes_of_a_model_are_refused_by_name(http, path, worker, rest, names, hint):
    """The error for an unknown attribute lists the valid ones, and says where versions and labels belong."""
    async with http.put(path(rest), json={**MODEL, **names}) as answer:
        document = await answer.json()
    assert (answer.status, document["reason"]) == (400, "BAD_REQUEST")
    assert document["error"].startswith(f"{', '.join(sorted(names))}: no such attribute of a model; there are type, ")
    assert hint in document["error"]
    assert worker.management.models == {}


async def test_an_unknown_attribute_of_a_load_is_refused(http, path, worker):
    await worker.management.add("m", "t", "/m", "")
    async with http.post(path("models/m/load"), json={"wait": True}) as answer:
        assert answer.status == 400
        assert "wait: no such attribute of a load" in (await answer.json())["error"]


async def test_limits_are_set_at_registration_and_changed_later(http, path, worker):
    """A null removes a limit. Invalid limits and other attributes are refused and change nothing."""
    async with http.put(path("models/m"), json={**MODEL, "min_copies": 1, "pinned": True}) as answer:
        assert answer.status == 201
        assert (await answer.json())["min_copies"] == 1
    async with http.patch(path("models/m"), json={"max_copies": 4, "pinned": None}) as answer:
        document = await answer.json()
        assert (answer.status, document["min_copies"], document["max_copies"]) == (200, 1, 4)
        assert "pinned" not in document
    for wrong in (
        {"max_copies": 0},
        {"min_copies": 9},
        {"min_copies": "2"},
        {"min_copies": True},
        {"pinned": 1},
        {"max_copies": 10**9},
        {"path": "/other"},
        [],
    ):
        async with http.patch(path("models/m"), json=wrong) as answer:
            assert (answer.status, (await answer.json())["reason"]) == (400, "BAD_REQUEST"), wrong
    assert worker.management.models["m"].limits == CopyLimits(1, 4)
    async with http.patch(path("models/none"), json={"max_copies": 4}) as answer:
        assert answer.status == 404


async def test_settings_are_read_and_written(http, path, worker):
    async with http.put(path("settings/type_limits"), json={"_default": {"max": 2}}) as answer:
        assert answer.status == 200
    async with http.get(path("settings")) as answer:
        assert (await answer.json())["settings"]["type_limits"] == '{"_default": {"max": 2}}'
    async with http.put(path("settings/type_limits")) as answer:
        assert answer.status == 200
    assert worker.management.tuning.texts["type_limits"] == ""
    async with http.put(path("settings/other"), json={"a": 1}) as answer:
        assert answer.status == 400
        assert "type_constraints" in (await answer.json())["error"]


async def test_a_key_may_be_an_object(http, path, worker):
    async with http.put(path("models/m"), json={"type": "t", "key": {"bucket": "b"}}) as answer:
        assert answer.status == 201
    assert worker.management.models["m"].key == '{"bucket":"b"}'
    assert worker.management.models["m"].path == ""


@pytest.mark.parametrize(
    ("rest", "body", "says"),
    [
        ("models/m", b"", "not JSON"),
        ("models/m", b"[]", "not a JSON object"),
        ("models/m", b"{}", "non-empty model type"),
        ("models/m", b'{"type": 1}', "type must be a string"),
        ("models/m", b'{"type": "t", "path": 1}', "path must be a string"),
        ("models/m", b'{"type": "t", "key": 1}', "key must be a string or an object"),
        ("models/m", b'{"type": "t", "path": "\\ud800"}', "path is not valid Unicode"),
        ("models/m", b'{"type": "t", "load": 1}', "load must be true or false"),
        ("models/" + "x" * 1025, b'{"type": "t"}', "longer than 1024 bytes"),
        ("models/%FF", b'{"type": "t"}', "not UTF-8"),
        ("models/a%00b", b'{"type": "t"}', "a key cannot hold"),
    ],
)
async def test_wrong_registrations_are_refused(http, path, rest, body, says):
    async with http.put(path(rest), data=body) as answer:
        assert (answer.status, (await answer.json())["reason"]) == (400, "BAD_REQUEST")
        assert says in (await answer.json())["error"]


async def test_a_body_too_large_for_one_model_is_413(http, path):
    async with http.put(path("models/m"), data=b" " * ((1 << 20) + 1)) as answer:
        assert answer.status == 413


async def test_an_unknown_model_is_404_and_unregistering_says_whether_it_existed(http, path):
    async with http.get(path("models/m")) as answer:
        assert (answer.status, (await answer.json())["reason"]) == (404, "UNKNOWN_MODEL")
    async with http.post(path("models/m/load"), json={"sync": True}) as answer:
        assert answer.status == 404
    async with http.put(path("models/m"), json=MODEL):
        pass
    async with http.get(path("models/m")) as answer:
        assert (answer.status, (await answer.json())["id"]) == (200, "m")
    for existed in (True, False):
        async with http.delete(path("models/m")) as answer:
            assert await answer.json() == {"id": "m", "existed": existed}


async def test_loading_with_and_without_a_body(http, path, worker):
    await worker.management.add("a/b", "t", "", "")
    async with http.post(path("models/a%2Fb/load")) as answer:
        assert answer.status == 200
    async with http.post(path("models/a%2Fb/load"), json={"sync": True}) as answer:
        assert answer.status == 200
    assert worker.management.loaded == [("a/b", False), ("a/b", True)]


async def test_explain_release_and_pods(http, path, worker):
    await worker.management.add("a/b", "t", "", "")
    async with http.get(path("models/a%2Fb/explain")) as answer:
        assert (await answer.json())["id"] == "a/b"
    async with http.post(path("models/a%2Fb/release")) as answer:
        assert (await answer.json())["id"] == "a/b"
    async with http.get(path("pods")) as answer:
        assert await answer.json() == {"pods": [{"pod": "pod-0"}], "open": []}
    async with http.get(path("pods/pod%2F0")) as answer:
        assert await answer.json() == {"pod": "pod/0"}


async def test_secrets_of_older_registrations_are_masked_wherever_they_are_shown(http, path, worker):
    key = json.dumps({"storage_params": {"type": "s3", "secret_access_key": "hunter2"}})
    await worker.management.add("m", "t", "https://user:hunter2@host/m", key)
    for url in ("models/m", "models"):
        async with http.get(path(url)) as answer:
            text = await answer.text()
        assert "hunter2" not in text
        for part in ("***@host/m", "secret_access_key"):
            assert part in text


async def test_a_reload_is_asked_for(http, path, worker):
    """A reload begins the model's next generation. An unregistered id is answered with 404."""
    await worker.management.add("a/b", "t", "", "")
    async with http.post(path("models/a%2Fb/reload")) as answer:
        assert (answer.status, (await answer.json())["generation"]) == (200, 1)
    async with http.post(path("models/b/reload")) as answer:
        assert answer.status == 404


async def test_models_are_listed_with_where_they_are(http, path, worker):
    for model_id in ("a1", "a2", "b"):
        await worker.management.add(model_id, "t", "/p", "")
    pods = [types.SimpleNamespace(pod=types.SimpleNamespace(name=name)) for name in ("p2", "p1")]
    worker.view.copies["a2"] = pods
    async with http.get(path("models?prefix=a&limit=1")) as answer:
        first = await answer.json()
    assert first["models"] == [{"id": "a1", "type": "t", "path": "/p", "key": "", "resident": False, "pods": []}]
    async with http.get(path(f"models?prefix=a&limit=10&after={first['next']}")) as answer:
        (second,) = (await answer.json())["models"]
    assert (second["id"], second["resident"], second["pods"]) == ("a2", True, ["p1", "p2"])
    async with http.get(path("models?limit=ten")) as answer:
        assert answer.status == 400


async def test_what_is_wrong_with_models_is_listed(http, path, worker):
    """The list of models includes their faults, so a search for trouble need not read each model."""
    for model_id in ("good", "killer"):
        await worker.management.add(model_id, "t", "/p", "")
    killer = worker.management.models["killer"]
    worker.management.models["killer"] = dataclasses.replace(killer, killed=("pod-1: died", "pod-2: died"))
    async with http.get(path("models")) as answer:
        good, bad = (await answer.json())["models"]
    assert "errors" not in good
    assert (bad["errors"], bad["quarantined"]) == (["pod-1: died", "pod-2: died"], True)


async def test_stats_of_a_fresh_worker_and_of_one_that_has_served(http, path, worker):
    async with http.get(path("stats")) as answer:
        empty = await answer.json()
    assert (empty["calls"], empty["hits"], empty["workers"], empty["pods"]) == ({}, 0, 2, 1)
    times = worker.registry.histogram("modelmesh_api_request_milliseconds", "", metrics.BUCKETS_MS, ("method", "code"))
    for code, n in (("OK", 3), ("NOT_FOUND", 1)):
        for _ in range(n):
            times.labels("ModelInfer", code).observe(1)
    hits = worker.registry.histogram("mesh_hit_milliseconds", "", metrics.BUCKETS_MS)
    for ms in (1, 1, 1, 150):
        hits.observe(ms)
    worker.registry.counter("mesh_loads", "").inc(2)
    async with http.get(path("stats")) as answer:
        stats = await answer.json()
    assert stats["calls"] == {"ModelInfer": {"OK": 3, "NOT_FOUND": 1}}
    assert (stats["hits"], stats["loads"]) == (4, 2)
    assert 0.5 <= stats["latency_ms"]["hit"]["p50"] <= 1
    assert 100 < stats["latency_ms"]["hit"]["p99"] <= 200


def test_stats_add_up_workers():
    snapshots = []
    for ms in (1, 100):
        registry = metrics.Registry()
        registry.histogram("mesh_hit_milliseconds", "", metrics.BUCKETS_MS).observe(ms)
        snapshots.append(registry.snapshot())
    assert statistics.summary(metrics.merge(snapshots))["latency_ms"]["hit"]["count"] == 2


# --- import ---


def ndjson(*items):
    return b"".join((item if isinstance(item, bytes) else json.dumps(item).encode()) + b"\n" for item in items)


async def told(answer):
    return [json.loads(line) for line in (await answer.read()).splitlines()]


async def test_import_registers_and_reports_bad_lines_one_by_one(http, worker):
    body = ndjson(
        {"id": "a", **MODEL},
        b"not json",
        b"",
        {"id": "a", **MODEL},
        {"id": "", **MODEL},
        {"id": "b", "type": "refused"},
        {"id": "c", "type": "t", "key": {"x": 1}},
        b"[]",
    )
    async with http.post(IMPORT, data=body) as answer:
        assert (answer.status, answer.headers["content-type"]) == (200, "application/x-ndjson")
        *lines, last = await told(answer)
    assert last == {"finished": True, "done": 7, "created": 2, "existing": 1, "failed": 4}
    errors = {line["error"]["line"]: line["error"] for line in lines}
    assert errors.keys() == {2, 5, 6, 8}
    assert errors[6] == {"line": 6, "id": "b", "reason": "CONFLICT", "text": "it is another one"}
    assert errors[2]["reason"] == "BAD_REQUEST"
    assert worker.management.models.keys() == {"a", "c"}


async def test_an_import_tells_which_types_no_pod_takes(http, worker, monkeypatch):
    """The last line of an import counts the registered models of each type that no pod takes, new and existing models
    alike. The number of types is bounded, because a caller may send a new type in each line."""
    odd = [{"id": f"m{number}", "type": "odd"} for number in range(3)]
    body = ndjson({"id": "a", **MODEL}, *odd, odd[0], {"id": "", "type": "odd"}, {"id": "b", "type": "oddest"})
    async with http.post(IMPORT, data=body) as answer:
        *_, last = await told(answer)
    assert last["untaken"] == [
        {"type": "odd", "models": 4, "text": "no pod accepts models of type odd"},
        {"type": "oddest", "models": 1, "text": "no pod accepts models of type oddest"},
    ]
    monkeypatch.setattr(bulk, "MAX_TYPES", 2)
    many = ndjson(*({"id": f"m-{number}", "type": f"odd{number % 4}"} for number in range(8)))
    async with http.post(IMPORT, data=many) as answer:
        *_, last = await told(answer)
    assert [(one["type"], one["models"]) for one in last["untaken"]] == [("odd0", 2), ("odd1", 2)]
    assert last["created"] == 8


async def test_import_refuses_unknown_attributes_by_name(http, worker):
    body = b'{"id": "a", "type": "t", "version": "8"}\n{"id": "b", "type": "t"}\n'
    async with http.post(IMPORT, data=body) as answer:
        bad, totals = [json.loads(line) for line in (await answer.text()).splitlines()]
    assert bad["error"]["line"] == 1
    assert bad["error"]["text"].startswith("version: no such attribute of a model; there are id, type")
    assert totals == {"finished": True, "done": 2, "created": 1, "existing": 0, "failed": 1}


async def test_many_are_unregistered(http, worker):
    """The answer to a bulk removal counts the removed and the missing models. It reports a model that is still in use,
    and lines that name no model."""
    for name in ("a", "b", "referred"):
        await worker.management.add(name, "t", "", "")
    lines = ['{"id": "a"}', '{"id": "x"}', '{"id": "referred"}', '{"id": 1}', '{"name": "b"}', '{"id": "b"}']
    async with http.post(IMPORT.replace("import", "unregister"), data="\n".join(lines)) as answer:
        *bad, totals = [json.loads(line) for line in (await answer.text()).splitlines()]
    assert totals == {"finished": True, "done": 6, "unregistered": 2, "missing": 1, "failed": 3}
    told = {error["error"]["line"]: error["error"]["text"] for error in bad}
    assert told == {
        3: "it has referents",
        4: "id must be a string",
        5: "name: no such attribute of a removal; there are id",
    }
    assert list(worker.management.models) == ["referred"]


async def test_import_takes_gzip_and_a_last_line_without_its_end(http, worker):
    body = ndjson({"id": "a", **MODEL}) + json.dumps({"id": "b", **MODEL}).encode()
    async with http.post(IMPORT, data=gzip.compress(body), headers={"Content-Encoding": "gzip"}) as answer:
        assert (await told(answer))[-1]["created"] == 2
    async with http.post(IMPORT, data=b"no gzip", headers={"Content-Encoding": "gzip"}) as answer:
        assert (await told(answer))[-1]["finished"] is False
    async with http.post(IMPORT, data=body, headers={"Content-Encoding": "br"}) as answer:
        assert answer.status == 400


async def test_an_empty_import_is_finished(http):
    async with http.post(IMPORT, data=b"") as answer:
        assert await told(answer) == [{"finished": True, "done": 0, "created": 0, "existing": 0, "failed": 0}]


async def test_an_import_goes_in_batches_and_tells_its_progress(http, worker, monkeypatch):
    monkeypatch.setattr(bulk, "_PROGRESS", 0.0)
    count = 3 * bulk.BATCH + 1
    async with http.post(IMPORT, data=ndjson(*({"id": f"m{n}", "type": "t"} for n in range(count)))) as answer:
        *progress, last = await told(answer)
    assert last["created"] == count == len(worker.management.models)
    assert max(worker.management.batches) == bulk.BATCH
    assert progress
    assert [line["done"] for line in progress] == sorted(line["done"] for line in progress)


async def test_an_import_ends_where_the_registry_is_away(http, worker):
    worker.management.error = MeshError(Reason.REGISTRY_AWAY, "etcd does not answer")
    async with http.post(IMPORT, data=ndjson(*({"id": f"m{n}", "type": "t"} for n in range(5000)))) as answer:
        *progress, error, last = await told(answer)
    assert all(not line["created"] for line in progress)
    assert error["error"]["reason"] == "REGISTRY_AWAY"
    assert last["finished"] is False


async def test_an_import_that_breaks_says_so_in_its_answer(http, worker):
    worker.management.error = RuntimeError("a bug")
    async with http.post(IMPORT, data=ndjson({"id": "m", "type": "t"})) as answer:
        *_, error, last = await told(answer)
    assert error["error"]["reason"] == "INTERNAL"
    assert last == {"finished": False}


async def test_many_bad_lines_are_counted_but_not_all_told(http):
    async with http.post(IMPORT, data=b"bad\n" * (bulk.MAX_REPORTED + 500)) as answer:
        *lines, last = await told(answer)
    assert last["failed"] == bulk.MAX_REPORTED + 500
    assert len(lines) == bulk.MAX_REPORTED


async def test_import_takes_every_member_of_a_gzip(http, worker):
    """The body has several gzip members, as `cat a.gz b.gz` produces them. They begin and end in the middle of
    lines."""
    body = ndjson(*({"id": f"m{n}", **MODEL} for n in range(30)))
    cuts = [0, 7, 7, 400, len(body)]
    packed = b"".join(gzip.compress(body[a:b]) for a, b in itertools.pairwise(cuts))
    async with http.post(IMPORT, data=packed, headers={"Content-Encoding": "gzip"}) as answer:
        assert (await told(answer))[-1] == {"finished": True, "done": 30, "created": 30, "existing": 0, "failed": 0}
    assert len(worker.management.models) == 30


async def test_an_import_of_which_nothing_is_a_model_ends_soon(http):
    """A few kilobytes of gzip expand to a million lines. The import ends after `MAX_BAD` bad lines."""
    packed = gzip.compress(b"x\n" * 1_000_000)
    async with http.post(IMPORT, data=packed, headers={"Content-Encoding": "gzip"}) as answer:
        *lines, error, last = await told(answer)
    assert (last["finished"], last["failed"]) == (False, bulk.MAX_BAD)
    assert "are not valid" in error["error"]["text"]
    assert len(lines) == bulk.MAX_REPORTED


FLOODS = {
    "bad lines": b"x\n" * 3000,
    "blank lines": b"\n" * 200_000,
    "one endless line": b"x" * 3_000_000,
    "bytes that are no text": b"\xff\n" * 3000,
    "models": ndjson(*({"id": f"m{n}", "type": "t"} for n in range(3000))),
}


@pytest.mark.parametrize("flood", FLOODS)
async def test_an_import_lets_others_have_their_turn(worker, monkeypatch, flood):
    """Although one read of the body expands to all lines, an import with a time slice of 0 lets other tasks run at
    least once for every 64 lines and every 64 KiB."""
    monkeypatch.setattr(bulk, "SLICE", 0.0)
    turns = 0

    async def others():
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    written = []

    async def write(document):
        written.append(document)

    beside = asyncio.create_task(others())
    packed = _pieces([gzip.compress(FLOODS[flood])])
    await bulk.Import(worker.management, write).run(bulk.lines_of(bulk.bounded(bulk.gunzip(packed))))
    beside.cancel()
    assert written[-1]["finished"]
    lines, size = FLOODS[flood].count(b"\n"), len(FLOODS[flood])
    assert turns >= max(lines // 64, size // (64 * 1024))


@pytest.mark.parametrize("limit", ["MAX_LINES", "MAX_BYTES"])
@pytest.mark.parametrize("body", [b"\n" * 5000, b"x" * 5000 + b"\n" * 5000], ids=["blank", "long"])
async def test_an_import_beyond_its_bounds_ends_and_says_so(http, monkeypatch, limit, body):
    monkeypatch.setattr(bulk, limit, 4000)
    async with http.post(IMPORT, data=gzip.compress(body), headers={"Content-Encoding": "gzip"}) as answer:
        error, last = (await told(answer))[-2:]
    assert last["finished"] is False
    assert error["error"]["reason"] == "TOO_LARGE"
    assert "4000" in error["error"]["text"]


async def test_only_so_many_imports_go_on_at_once(http):
    gate = asyncio.Event()

    async def body():
        yield b"\n"
        await gate.wait()

    imports = [await http.post(IMPORT, data=body()) for _ in range(bulk.AT_ONCE)]
    async with http.post(IMPORT, data=b"") as answer:
        assert (answer.status, answer.headers["Retry-After"]) == (429, "5")
    gate.set()
    for one in imports:
        assert (await told(one))[-1]["finished"]
    async with http.post(IMPORT, data=b"") as answer:
        assert answer.status == 200


async def test_an_import_whose_body_stops_ends_and_says_so(http, monkeypatch):
    monkeypatch.setattr(routes, "_READ_TIMEOUT", 0.1)
    ended = asyncio.Event()

    async def body():
        yield b"\n"
        await ended.wait()

    async with http.post(IMPORT, data=body()) as answer:
        error, last = await told(answer)
    ended.set()
    assert (error["error"]["reason"], last["finished"]) == ("TOO_SLOW", False)


async def test_a_long_id_is_not_repeated_in_full(http):
    body = ndjson({"id": "i" * 60_000, "type": "refused"})
    async with http.post(IMPORT, data=body) as answer:
        error, _ = await told(answer)
    assert error["error"]["id"] == "i" * 256


async def test_an_import_whose_client_goes_away_ends(http, worker):
    """The client disconnects in the middle of the body, and the batch in progress is cancelled."""
    fates = []

    async def register_many(items):
        fates.append("under way")
        try:
            await asyncio.Event().wait()
        finally:
            fates[0] = "ended"

    async def body():
        yield ndjson(*({"id": f"m{n}", "type": "t"} for n in range(bulk.BATCH)))
        await asyncio.Event().wait()

    worker.management.register_many = register_many
    answer = await http.post(IMPORT, data=body())
    await until(lambda: fates == ["under way"], why="the first batch is under way")
    answer.close()
    await until(lambda: fates == ["ended"], why="the batch is cancelled")


def _cut(stream, cuts):
    edges = sorted({0, len(stream), *(cut % (len(stream) + 1) for cut in cuts)})
    return [stream[a:b] for a, b in itertools.pairwise(edges)]


async def _pieces(chunks):
    for chunk in chunks:
        yield chunk


@given(st.lists(st.binary(max_size=20).filter(lambda b: b"\n" not in b)), st.lists(st.integers(0, 1000)), st.booleans())
def test_lines_are_the_same_however_the_stream_is_cut(lines, cuts, ended):
    stream = b"\n".join(lines) + b"\n" * ended

    async def collect(chunks):
        return [line async for line in bulk.lines_of(_pieces(chunks))]

    expected = stream.split(b"\n")
    expected = expected if expected[-1] else expected[:-1]
    assert asyncio.run(collect(_cut(stream, cuts))) == expected


def test_a_line_without_end_takes_bounded_memory_and_costs_one_line():
    piece = b"x" * 10_000

    async def collect():
        chunks = [b'{"id":1}\n', *([piece] * 50), b"tail\n", b'{"id":2}\n']
        return [line async for line in bulk.lines_of(_pieces(chunks))]

    first, long, last = asyncio.run(collect())
    assert (first, last) == (b'{"id":1}', b'{"id":2}')
    assert bulk.MAX_LINE < len(long) <= bulk.MAX_LINE + len(piece)
    with pytest.raises(MeshError, match="at most"):
        bulk.parse(long)


@given(
    st.binary(max_size=100)
    | st.recursive(st.none() | st.text() | st.integers(), st.lists).map(lambda v: json.dumps(v).encode())
)
def test_a_line_that_is_no_object_is_refused(line):
    with pytest.raises(MeshError):
        bulk.parse(line)


async def test_a_body_that_does_not_come_is_not_waited_for(served, monkeypatch):
    monkeypatch.setattr("router.rest.management._BODY_TIMEOUT", 0.1)
    reader, writer = await asyncio.open_connection("127.0.0.1", served)
    writer.write(
        b'PUT /mesh/v1/models/m HTTP/1.1\r\nHost: localhost\r\nX-Mesh-Request: 1\r\nContent-Length: 9\r\n\r\n{"a"'
    )
    assert (await reader.readuntil(b"\r\n")).split()[1] == b"408"
    writer.close()
