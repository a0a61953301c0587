"""Records in etcd, which keep all their fields when read and written, even those that Mesh does not know."""

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.etcd.ranges import after_prefix
from mesh.schema import copytoken
from mesh.schema.keys import Keys
from mesh.schema.lives import Life, RouterRecord, Tombstone
from mesh.schema.records import CopyRecord, Failure, ModelRecord, PodRecord, Reload, check_id
from placement.blame import Blame
from placement.copies import CopyLimits
from placement.failures import FailureKind
from tests.support.anyjson import NAMES, as_json, json_values

KEYS = Keys("mm/test")


ids = st.text(st.characters(blacklist_categories=("Cs",), blacklist_characters="\0"), min_size=1, max_size=40)


def test_reads_modelmeshs_record_and_keeps_unknown_attributes():
    """A record written by ModelMesh still has all its attributes after Mesh has read and written it."""
    before = {
        "type": "onnx", "encKey": '{"storage_key":"s"}', "mPath": "a/b", "lu": 1700000000000, "refs": 1,
        "instanceIds": {"abc": 5}, "failedIn": {"p": 9}, "fails": {"p": {"msg": "no"}}, "autoDel": True,
        "mesh": {"hostBytes": 7, "future": [1]},
    }  # fmt: skip
    record = ModelRecord.decode(json.dumps(before).encode())
    assert (record.type, record.path, record.key, record.refs) == ("onnx", "a/b", '{"storage_key":"s"}', 1)
    assert record.failures == (Failure("p", 9, "no"),)
    assert json.loads(record.encode()) == before


def test_an_absent_type_is_the_legacy_one():
    """A record without a type has the legacy type, because ModelMesh leaves out the type of its oldest records."""
    assert ModelRecord.decode(b"{}").type == "NLCLASSIFIER"


@pytest.mark.parametrize(
    "value",
    [
        b"",
        b"[]",
        b"\xff",
        b'{"lu":"x"}',
        b'{"mesh":[1]}',
        b'{"failedIn":3}',
        b'{"fails":{"p":1},"failedIn":{"p":1}}',
        b"[" * 100_000,
    ],
)
def test_a_broken_model_record_is_a_value_error(value):
    with pytest.raises(ValueError):
        ModelRecord.decode(value)


@given(st.binary(max_size=60))
def test_garbage_never_crashes_a_decoder(value):
    for kind in (ModelRecord, PodRecord, CopyRecord):
        try:
            kind.decode(value)
        except ValueError:
            pass


WHOLE = [
    (ModelRecord, ModelRecord("t", failures=(Failure("p", 1, "no"),), host_bytes=1, killed=("x",))),
    (PodRecord, PodRecord("i", "h:1", "h:2", labels=("gpu",), age_ms=10, token="t")),
    (CopyRecord, CopyRecord("i", 77, "loaded", 1, 2, 3, version="8")),
    (Life, Life("h:1", "h:2", 3, 4, "token", 5)),
    (Tombstone, Tombstone("t", "p", "k", "s")),
    (RouterRecord, RouterRecord("h:1", "h:3", 2, (1, 2))),
    (Reload, Reload(3, "why")),
]


@pytest.mark.parametrize(("kind", "whole"), WHOLE, ids=lambda value: getattr(value, "__name__", ""))
@given(st.data())
def test_any_value_of_any_attribute_is_a_record_or_a_value_error(kind, whole, data):
    """With any value in any attribute, reading a record succeeds or raises ValueError. A record that was read can be
    written, read again and compared."""
    fields = json.loads(whole.encode())
    for name in data.draw(st.lists(st.sampled_from(sorted(fields) + NAMES), min_size=1, max_size=3)):
        fields[name] = data.draw(json_values)
    try:
        record = kind.decode(as_json(fields).encode("utf-8", "surrogatepass"))
    except ValueError:
        return
    again = kind.decode(record.encode())
    assert again == record or "NaN" in as_json(fields)
    if kind is CopyRecord:
        assert record.token.isascii()


@pytest.mark.parametrize("number", ["1e999", "-1e999", "NaN", "1" * 30])
def test_a_number_that_is_none_makes_a_record_none(number):
    """A record with an invalid number is refused when it is read. Otherwise the number would fail only where it is
    used."""
    copy = CopyRecord("i", 77, "loaded").encode().replace(b'"age":0', b'"age":' + number.encode())
    with pytest.raises(ValueError, match="one of its attributes cannot be used"):
        CopyRecord.decode(copy)


@pytest.mark.parametrize("address", ["", "here", "h:99999", "h :1", "h:1\r\nx: y", "\u0661:\u0661", 7.5])
def test_an_address_that_is_none_makes_a_pod_none(address):
    """A pod's record with an invalid address is refused. Otherwise the first call to the pod would fail in the code
    that follows etcd."""
    fields = {"incarnation": "i", "data": address, "control": "h:2"}
    with pytest.raises(ValueError, match="one of its attributes"):
        PodRecord.decode(json.dumps(fields).encode())


def test_failures_expire_and_one_a_pod_is_kept():
    """A record keeps the newest failure of each pod until it expires."""
    record = ModelRecord("t", failures=(Failure("a", 100, "old"), Failure("b", 5, "expired")))
    record = record.with_failure(Failure("a", 150, "new"), 160, 100)
    assert record.failures == (Failure("a", 150, "new", since_ms=100),)
    assert record.recent_failures(251, 100) == ()


def test_failures_survive_a_round_trip_and_are_readable_by_modelmesh():
    """Failures survive a round trip, with times and texts where ModelMesh looks for them. Failures that ModelMesh wrote
    count as lasting."""
    failure = Failure("a", 150, "no", FailureKind.PASSING, 100, 5000, "digest", "secret")
    record = ModelRecord("t", failures=(failure, Failure("b", 120, "old", since_ms=120)))
    assert ModelRecord.decode(record.encode()).failures == (failure, Failure("b", 120, "old"))
    data = json.loads(record.encode())
    assert data["failedIn"] == {"a": 150, "b": 120}
    assert {pod: more["msg"] for pod, more in data["fails"].items()} == {"a": "no", "b": "old"}
    assert data["fails"]["b"] == {"msg": "old"}


def test_blames_survive_a_round_trip():
    """Blames survive a round trip, with the request and the reason for a quarantine. Absolving the model removes all of
    its blames."""
    one = Blame("a", 5, "", sure=True, digests=("aa", "bb"))
    record = ModelRecord("t", killed=("x",), blames=(one,), guilty="for a reason")
    assert ModelRecord.decode(record.encode()) == record
    assert record.quarantined
    assert not replace(record, guilty="", killed=("x", "y")).quarantined, "these deaths do not add up to a quarantine"
    assert ModelRecord.decode(record.absolved().encode()) == ModelRecord("t")


def test_two_deaths_are_a_quarantine():
    """Two deaths quarantine a model, because one may be chance."""
    assert not ModelRecord("t", killed=("x",)).quarantined
    assert ModelRecord("t", killed=("x", "y")).quarantined


def test_pods_and_copies_survive_a_round_trip():
    """Each attribute has a different value, so that none can be mistaken for another."""
    pod = PodRecord("i", "h:1", "h:2", "leaving", (1, 2), ("gpu",), "z", 1, 2, 3, 4, 5, 6, 7, 8, 9, "h:3", 10, "disk")
    assert PodRecord.decode(replace(pod, oldest_unused=True).encode()).oldest_unused
    copy = CopyRecord("i", 77, "loaded", 1, 2, 3, version="8")
    assert PodRecord.decode(pod.encode()) == pod
    assert CopyRecord.decode(copy.encode()) == copy
    assert copy.token == b"i.77"


HEX = st.text("0123456789abcdef", max_size=64)
COUNTS = st.integers(0, 2**62)
TEXTS = st.text(st.characters(blacklist_categories=("Cs",)), max_size=20)
LIMITS = st.sampled_from(
    [CopyLimits(), CopyLimits(0), CopyLimits(2, 5), CopyLimits(None, 1, True), CopyLimits(pinned=False)]
)
FAILURES = st.lists(st.builds(Failure, ids, COUNTS, TEXTS), max_size=3, unique_by=lambda failure: failure.pod).map(
    lambda failures: tuple(sorted(failures, key=lambda failure: -failure.at_ms))
)
MODELS = st.builds(
    ModelRecord,
    type=TEXTS,
    path=TEXTS,
    key=TEXTS,
    last_used_ms=COUNTS,
    failures=FAILURES,
    refs=COUNTS,
    host_bytes=COUNTS,
    device_bytes=COUNTS,
    load_ms=COUNTS,
    sha256=HEX,
    digest=HEX,
    digest_ms=COUNTS,
    generation=COUNTS,
    changed=HEX,
    changed_ms=COUNTS,
    limits=LIMITS,
    killed=st.lists(TEXTS, max_size=3).map(tuple),
    other=st.just({"instanceIds": {"abc": 5}}),
    other_mesh=st.just({"future": [1]}),
)
COPIES = st.builds(
    CopyRecord,
    st.text("0123456789abcdef", min_size=1, max_size=16),
    COUNTS,
    st.sampled_from(["loading", "loaded"]),
    COUNTS,
    COUNTS,
    COUNTS,
    TEXTS,
    COUNTS,
    HEX,
    COUNTS,
)


@given(MODELS)
def test_every_model_record_survives_a_round_trip(record):
    assert ModelRecord.decode(record.encode()) == record


@given(COPIES)
def test_every_copy_survives_a_round_trip_and_so_does_its_token(copy):
    """A copy's record survives a round trip, and its token contains the copy's incarnation, create revision and
    generation."""
    again = CopyRecord.decode(copy.encode())
    assert again == copy
    assert copytoken.read(again.token) == (copy.incarnation.encode(), copy.create_revision, copy.generation)


@given(MODELS)
def test_what_was_loaded_is_no_part_of_a_registration(record):
    """Loaded content is not part of a registration: registering the same model again is no conflict, whatever its
    generation, and a reload changes nothing else."""
    asked = ModelRecord(record.type, record.path, record.key, sha256=record.sha256)
    after = record.reloaded()
    assert record.same_registration(asked)
    assert after.same_registration(asked)
    assert (after.generation, after.digest, after.changed) == (record.generation + 1, "", "")
    assert (after.limits, after.refs, after.other, after.host_bytes) == (
        record.limits,
        record.refs,
        record.other,
        record.host_bytes,
    )


@given(st.builds(Reload, COUNTS, TEXTS))
def test_a_reload_survives_a_round_trip(reload):
    assert Reload.decode(reload.encode()) == reload


@pytest.mark.parametrize("value", [b"", b"{}", b'{"generation":"x"}', b'{"generation":1e999}', b"[1]"])
def test_a_broken_reload_is_a_value_error(value):
    with pytest.raises(ValueError):
        Reload.decode(value)


@given(ids, ids)
def test_ids_survive_the_keys(model, pod):
    """Any id is recovered from its key, slashes and percent signs included."""
    assert KEYS.copy_of(KEYS.copy(model, pod)) == (model, pod)
    assert KEYS.pod_of(KEYS.pod(pod)) == pod
    assert KEYS.reload_of(KEYS.reload(model)) == model
    assert KEYS.model_of(KEYS.model(model)) == model


@given(ids, ids)
def test_no_models_copies_stand_in_anothers_range(one, other):
    """The key ranges of the copies of `a` and `a/b`, or of `a` and `ab`, do not overlap."""
    start = KEYS.copies(one)
    inside = start <= KEYS.copy(other, "p") < after_prefix(start)
    assert inside == (one == other)


def test_the_presence_range_holds_pods_and_copies_only():
    """The presence range contains pods and copies but no registrations, so a router that watches it receives no
    registrations."""
    start, end = KEYS.presence_range
    assert start <= KEYS.copy("m", "p") < end
    assert start <= KEYS.pod("\U0010ffff") < end
    assert not start <= KEYS.model("m") < end
    assert not start <= KEYS.vmodel("m") < end
    assert not start <= KEYS.config + b"x" < end


@pytest.mark.parametrize("bad", ["", "a\0b", "x" * 1025, "\ud800"])
def test_ids_that_no_key_can_hold_are_refused(bad):
    with pytest.raises(ValueError):
        check_id(bad)
