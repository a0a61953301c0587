"""Records of virtual models, which Mesh reads and writes like ModelMesh, without losing anything in them."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.schema import vmodels
from placement.vmodels.record import Mirror, VModelMore, VModelRecord
from tests.support.anyjson import as_json, json_values

OF_MODELMESH = [
    ({"amid": "m1", "tmid": "m1"}, VModelRecord("m1", "m1")),
    ({"o": "me", "amid": "m1", "tmid": "m1"}, VModelRecord("m1", "m1", "me")),
    ({"o": "me", "amid": "m1", "tmid": "m2"}, VModelRecord("m1", "m2", "me")),
    ({"amid": "m1", "tmid": "m2", "failed": True}, VModelRecord("m1", "m2", failed=True)),
]
WHOLE = VModelRecord(
    "fraud@7",
    "fraud@8",
    "me",
    True,
    VModelMore(
        {"7": "fraud@7", "8": "fraud@8"},
        keep=3,
        weights={"fraud@7": 90, "fraud@8": 10},
        sticky="x-user",
        mirror=Mirror("fraud@9", 2.5),
        wait=True,
        why="no room",
    ),
)


@pytest.mark.parametrize(("fields", "record"), OF_MODELMESH, ids=lambda value: None)
def test_modelmeshs_records_are_read_and_written_byte_by_byte(fields, record):
    """A record of ModelMesh is written back with the same bytes. Mesh and ModelMesh leave out attributes that have
    their default."""
    value = json.dumps(fields, separators=(",", ":")).encode()
    assert vmodels.decode(value) == record
    assert vmodels.encode(record) == value


def test_what_mesh_adds_is_one_attribute_beside_modelmeshs():
    """Everything that Mesh adds to ModelMesh's record is in one attribute, which ModelMesh keeps as unknown."""
    assert json.loads(vmodels.encode(WHOLE)) == {
        "o": "me", "amid": "fraud@7", "tmid": "fraud@8", "failed": True,
        "mesh": {
            "versions": {"7": "fraud@7", "8": "fraud@8"}, "keep": 3, "weights": {"fraud@7": 90, "fraud@8": 10},
            "sticky": "x-user", "mirror": {"target": "fraud@9", "share": 2.5}, "wait": True, "why": "no room",
        },
    }  # fmt: skip
    assert vmodels.decode(vmodels.encode(WHOLE)) == WHOLE


def test_unknown_attributes_survive_at_both_levels():
    """Unknown attributes may have been written by a later version of Mesh, or by ModelMesh (`actionable`)."""
    fields = {"amid": "a", "tmid": "b", "mesh": {"keep": 1, "canary": {"step": 5}}, "actionable": True, "x": [None]}
    assert json.loads(vmodels.encode(vmodels.decode(json.dumps(fields).encode()))) == fields


@pytest.mark.parametrize(
    "value",
    [
        b"",
        b"[]",
        b"{}",
        b'{"amid":""}',
        b'{"amid":"a","mesh":[1]}',
        b'{"amid":"a","mesh":{"weights":{"a":-1}}}',
        b'{"amid":"a","mesh":{"weights":[1]}}',
        b'{"amid":"a","mesh":{"versions":{"1":null}}}',
        b'{"amid":"a","mesh":{"versions":{"1":""}}}',
        b'{"amid":"a","mesh":{"mirror":{}}}',
        b'{"amid":"a","mesh":{"mirror":{"target":"b","share":NaN}}}',
        b'{"amid":"a","mesh":{"mirror":{"target":"b","share":101}}}',
    ],
)
def test_an_invalid_record_is_a_value_error(value):
    """Readers skip a record that raises ValueError. Any other error would end them."""
    with pytest.raises(ValueError, match=r"it is not|it lacks|one of its attributes"):
        vmodels.decode(value)


@pytest.mark.parametrize("fields", [{"amid": "a"}, {"tmid": "a"}, {"amid": "a", "tmid": None}])
def test_a_record_with_one_of_two_models_does_not_move(fields):
    """If a record names only one of its two models, that model is both active and the target, and nothing moves."""
    assert vmodels.decode(json.dumps(fields).encode()) == VModelRecord("a", "a")


_NAMES = ["o", "amid", "tmid", "failed", "mesh"]
_MESH_NAMES = ["versions", "keep", "weights", "sticky", "mirror", "wait", "why", "new"]


@given(st.data())
def test_any_value_of_any_attribute_is_a_record_or_a_value_error(data):
    """A record that could be read is the same after being written and read again."""
    fields = json.loads(vmodels.encode(WHOLE))
    inner = data.draw(st.booleans())
    changed = fields["mesh"] if inner else fields
    for name in data.draw(st.lists(st.sampled_from(_MESH_NAMES if inner else _NAMES), min_size=1, max_size=3)):
        changed[name] = data.draw(json_values)
    text = as_json(fields)
    try:
        record = vmodels.decode(text.encode("utf-8", "surrogatepass"))
    except ValueError:
        return
    assert vmodels.decode(vmodels.encode(record)) == record or "NaN" in text


def test_each_model_is_named_once_whatever_its_roles():
    """Each model of an alias is listed once, whatever its roles, because references count aliases."""
    assert WHOLE.names() == {"fraud@7", "fraud@8", "fraud@9"}
    assert VModelRecord("a", "b").names() == {"a", "b"}
    assert VModelRecord("a", "a", more=VModelMore(weights={"c": 0})).names() == {"a", "c"}


def test_a_model_is_the_latest_of_its_versions():
    """If a model is registered as several versions, its version is the latest of them."""
    more = VModelMore({"1": "a", "2": "b", "3": "a"})
    assert [more.version_of(model) for model in ("a", "b", "c")] == ["3", "2", ""]


@given(value=st.binary(max_size=40), data=st.data())
def test_whatever_a_record_is_its_models_can_be_read_or_left_out(value, data):
    """What is left of a damaged record names only models that can be parts of keys."""
    if data.draw(st.booleans()):
        fields = json.loads(vmodels.encode(WHOLE))
        inner = data.draw(st.booleans())
        name = data.draw(st.sampled_from(_MESH_NAMES if inner else _NAMES))
        (fields["mesh"] if inner else fields)[name] = data.draw(json_values)
        value = as_json(fields).encode("utf-8", "surrogatepass")
    left = vmodels.salvaged(value)
    assert all(name and "\0" not in name and name.encode() for name in left.names())


@given(names=st.lists(st.text(min_size=1, max_size=5).filter(str.isalnum), min_size=5, max_size=5, unique=True))
def test_a_whole_record_loses_no_name(names):
    active, target, version, weight, mirror = names
    more = VModelMore(versions={"1": version}, weights={weight: 1}, mirror=Mirror(mirror, 1.0))
    assert vmodels.salvaged(vmodels.encode(VModelRecord(active, target, "me", more=more))).names() == set(names)
