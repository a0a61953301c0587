"""Aliases over REST: documents become requests to management, and results become documents."""

import pytest
from yarl import URL

from mesh.schema.records import ModelRecord
from mesh.statuses import MeshError, Reason
from placement.vmodels.changes import SetVModel
from placement.vmodels.record import Mirror, VModelMore, VModelRecord
from router.management.requests import Item, MoveVModel
from router.rest import aliasdocuments
from router.state.differing import DifferentError

MOVING = VModelRecord(
    "fraud@7",
    "fraud@8",
    "me",
    True,
    VModelMore(
        {"7": "fraud@7", "8": "fraud@8"},
        weights={"fraud@7": 90, "fraud@8": 10},
        sticky="x-user",
        mirror=Mirror("fraud@9", 2.5),
        why="no room",
    ),
)
MODEL = {"type": "onnx", "path": "/8", "key": {"storage_key": "s"}}


@pytest.fixture
def path(served):
    return lambda rest: URL(f"http://127.0.0.1:{served}/mesh/v1/{rest}", encoded=True)


MOVES = [
    pytest.param({"target": "m"}, MoveVModel("a", SetVModel(target="m")), id="as-modelmesh"),
    pytest.param(
        {"version": "8", "model": MODEL},
        MoveVModel(
            "a",
            SetVModel(target="a@8", version="8", ready=True),
            Item("a@8", "onnx", "/8", '{"storage_key":"s"}'),
            auto_delete=True,
            load_now=True,
        ),
        id="version",
    ),
    pytest.param(
        {"target": "m", "model": {"type": "onnx"}, "auto_delete": False, "ready": False, "sync": True, "wait": 5},
        MoveVModel("a", SetVModel(target="m"), Item("m", "onnx"), sync=True, wait=5.0),
        id="model-without-a-version",
    ),
    pytest.param(
        {"weights": {"m": 90, "n": 10}, "sticky": "x-user", "mirror": {"target": "o", "share": 5}, "keep": 3},
        MoveVModel("a", SetVModel(weights={"m": 90, "n": 10}, sticky="x-user", mirror=Mirror("o", 5.0), keep=3)),
        id="split",
    ),
    pytest.param(
        {"weights": None, "sticky": None, "mirror": None},
        MoveVModel("a", SetVModel(weights={}, sticky="", no_mirror=True)),
        id="no-split",
    ),
    pytest.param(
        {"version": "7", "force": True, "update_only": True, "expected_target": "m", "owner": "me", "load": True},
        MoveVModel(
            "a",
            SetVModel(version="7", force=True, update_only=True, expected_target="m", owner="me"),
            load_now=True,
        ),
        id="to-a-version",
    ),
]


@pytest.mark.parametrize(("document", "request_"), MOVES)
def test_a_document_is_a_request(document, request_):
    """Attributes that a document leaves out stay unchanged. A null removes the weights, the sticky header or the
    mirror."""
    assert aliasdocuments.move_of(document, "a") == request_


@pytest.mark.parametrize(
    ("document", "text"),
    [
        ({"targte": "m"}, "targte: no such attribute of an alias; there are target, version"),
        ({"model": {"type": "onnx"}}, "name the model to register"),
        ({"model": "m"}, "model must be an object"),
        ({"version": "1", "model": {"type": "onnx", "nam": "x"}}, "nam: no such attribute of an alias's model"),
        ({"version": 8}, "version must be a string"),
        ({"target": "\ud800"}, "target is not valid Unicode"),
        ({"force": 1}, "force must be true or false"),
        ({"keep": True}, "keep must be a whole number"),
        ({"wait": 0}, "wait must be a number of seconds above 0"),
        ({"wait": float("nan")}, "wait must be a number of seconds above 0"),
        ({"weights": {"m": 0.5}}, "weights must be an object of whole numbers"),
        ({"weights": [1]}, "weights must be an object of whole numbers"),
        ({"mirror": {"share": 5}}, "mirror must be null or an object"),
        ({"mirror": {"target": "m", "shares": 5}}, "shares: no such attribute of mirror"),
        ({"mirror": {"target": "m", "share": "5"}}, "share must be a percentage"),
    ],
)
def test_a_document_that_cannot_be_a_request(document, text):
    """Unknown attributes, and values that are not valid, are refused by name."""
    with pytest.raises(MeshError, match=text) as error:
        aliasdocuments.move_of(document, "a")
    assert error.value.reason is Reason.BAD_REQUEST


def test_a_rollback_leads_to_the_version_before_or_to_a_named_one():
    """A rollback waits for a loaded copy unless the document says otherwise."""
    assert aliasdocuments.rollback_of({}, "a") == MoveVModel("a", SetVModel(back=True, ready=True), load_now=True)
    assert aliasdocuments.rollback_of({"version": "7", "force": True, "ready": False}, "a") == MoveVModel(
        "a", SetVModel(version="7", force=True)
    )
    with pytest.raises(MeshError, match="target: no such attribute of a rollback"):
        aliasdocuments.rollback_of({"target": "m"}, "a")


async def test_an_alias_is_set_read_and_deleted(http, path, worker):
    """Creating an alias answers 201, changing it 200, and reading a missing one 404."""
    aliases = worker.management.vmodels
    aliases.records["a/b"] = MOVING
    async with http.put(path("aliases/a%2Fb"), json={"target": "m"}) as answer:
        assert answer.status == 201
        document = await answer.json()
    assert aliases.requests == [MoveVModel("a/b", SetVModel(target="m"))]
    assert document == {
        "id": "a/b",
        "owner": "me",
        "status": "TRANSITION_FAILED",
        "active": "fraud@7",
        "target": "fraud@8",
        "version": "7",
        "target_version": "8",
        "versions": {"7": "fraud@7", "8": "fraud@8"},
        "keep": 2,
        "weights": {"fraud@7": 90, "fraud@8": 10},
        "sticky": "x-user",
        "mirror": {"target": "fraud@9", "share": 2.5},
        "why": "no room",
        "models": [
            {"id": "fraud@7", "status": "LOADED", "errors": [], "copies": 0},
            {"id": "fraud@8", "status": "LOADING", "errors": ["no room"], "copies": 0},
        ],
    }
    async with http.put(path("aliases/a%2Fb"), json={"target": "m", "update_only": True}) as answer:
        assert answer.status == 200
    async with http.get(path("aliases/a%2Fb")) as answer:
        assert await answer.json() == document
    async with http.get(path("aliases"), params={"prefix": "a"}) as answer:
        listed = await answer.json()
    assert [alias["id"] for alias in listed["aliases"]] == ["a/b"]
    assert listed["next"] is None
    async with http.post(path("aliases/a%2Fb/rollback")) as answer:
        assert answer.status == 200
    assert aliases.requests[-1].change.back
    async with http.delete(path("aliases/a%2Fb?owner=me")) as answer:
        assert await answer.json() == {"id": "a/b", "existed": True}
    assert aliases.deleted == [("a/b", "me")]
    async with http.get(path("aliases/none")) as answer:
        assert answer.status == 404
        assert "there is no alias none, or it has another owner" in (await answer.json())["error"]


async def test_a_version_that_exists_with_another_file_is_refused_with_the_way_out(http, path, worker):
    there, asked = ModelRecord(type="onnx", path="/7"), ModelRecord(type="onnx", path="/8")

    async def conflict(*_):
        raise DifferentError("fraud@8", there, asked)

    worker.management.vmodels.set = conflict
    async with http.put(
        path("aliases/fraud"), json={"version": "8", "model": {"type": "onnx", "path": "/8"}}
    ) as answer:
        assert answer.status == 409
        text = "model fraud@8 is registered with path '/7', not '/8'. Give the new one another version"
        assert (await answer.json())["error"] == text
