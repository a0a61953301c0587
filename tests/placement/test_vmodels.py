"""Decisions about virtual models: who may change what, when a move ends at once, and reference counts that stay
exact."""

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from placement.vmodels import changes
from placement.vmodels.changes import MISSING, Change, NamedModel, Refusal, RefusalCause, SetVModel
from placement.vmodels.record import Mirror, VModelMore, VModelRecord
from tests.support.examples import examples

IDLE = NamedModel(refs=1)
LOADED = NamedModel(refs=1, copies=1, loaded=1)


def changed(before, models, **request) -> VModelRecord:
    """Returns the record after a request, which must be granted."""
    change = changes.set_vmodel("v", before, models, SetVModel(**request))
    assert isinstance(change, Change), change
    assert change.after is not None
    return change.after


def refused(before, models, **request) -> tuple[str, str]:
    """Returns the cause and the text of a refusal."""
    refusal = changes.set_vmodel("v", before, models, SetVModel(**request))
    assert isinstance(refusal, Refusal), refusal
    return refusal.cause.name, refusal.text


# --- ModelMesh's checks ---


def test_a_new_vmodel_serves_its_target_at_once():
    """A new vmodel has no model to move from, so the requested model is active at once, loaded or not."""
    assert changed(None, {"a": IDLE}, target="a") == VModelRecord("a", "a")
    assert changed(None, {"a": IDLE}, target="a", owner="me", default_owner="us").owner == "me"
    assert changed(None, {"a": IDLE}, target="a", default_owner="us").owner == "us"


REFUSALS = [
    (None, {}, {"target": "b"}, "NOT_FOUND", "Target model b not found"),
    (None, {"b": IDLE}, {"target": "b", "update_only": True}, "NOT_FOUND", "vmodel v not found"),
    (None, {}, {"target": "b", "update_only": True}, "NOT_FOUND", "Target model b not found"),
    (None, {"b": IDLE}, {"target": "b", "expected_target": "a"}, "PRECONDITION", "does not exist"),
    ("me", {"b": IDLE}, {"target": "b", "expected_target": "c"}, "PRECONDITION", "model a does not match expected c"),
    ("me", {"b": IDLE}, {"target": "b", "owner": "u"}, "CONFLICT", 'vmodel v already exists with different owner "me"'),
    ("", {"b": IDLE}, {"target": "b", "owner": "u"}, "CONFLICT", 'vmodel v already exists with different owner ""'),
    ("me", {}, {"target": "b", "owner": "you", "expected_target": "c"}, "CONFLICT", "different owner"),
    ("me", {}, {"target": "b", "owner": "you"}, "NOT_FOUND", "Target model b not found"),
    ("me", {"b": replace(IDLE, differs=True)}, {"target": "b", "create": True}, "DIFFERENT", "other attributes"),
    ("me", {"b": IDLE}, {"weights": {"b": 1, "c": 1}}, "NOT_FOUND", "Target model c not found"),
    ("me", {}, {"mirror": Mirror("c", 1.0)}, "NOT_FOUND", "Target model c not found"),
    ("me", {}, {"version": "9"}, "NO_VERSION", "v has no version 9: it has no versions"),
    ("me", {}, {"back": True}, "PRECONDITION", "v has no version before its target, model a"),
    (None, {}, {"back": True}, "NOT_FOUND", "vmodel v not found"),
    (None, {}, {"version": "9"}, "NOT_FOUND", "vmodel v not found"),
    (None, {}, {"keep": 3}, "NOT_FOUND", "vmodel v not found"),
    ("me", {}, {"keep": 99}, "INVALID", "keep must be a number of versions from 0 to 10"),
]  # fmt: skip


@pytest.mark.parametrize(("owner", "models", "request_", "cause", "text"), REFUSALS)
def test_what_is_refused(owner, models, request_, cause, text):
    """Requests are checked in ModelMesh's order: expected target, existence of the target, owner, update only."""
    before = None if owner is None else VModelRecord("a", "a", owner)
    named, said = refused(before, {"a": LOADED, **models} if before else models, **request_)
    assert (named, text in said) == (cause, True), said


def test_the_expected_target_may_be_the_requested_one():
    """A request that is repeated after its answer was lost is granted, although the target that it expects was replaced
    by the request itself."""
    before = VModelRecord("a", "b")
    assert changed(before, {"a": LOADED, "b": IDLE}, target="b", expected_target="a") == before
    assert changed(None, {"a": IDLE}, target="a", expected_target="a").active == "a"


# --- moves ---


@pytest.mark.parametrize(
    ("active", "target", "request_", "moves"),
    [
        pytest.param(NamedModel(copies=1, loaded=1), IDLE, {}, True, id="serving"),
        pytest.param(NamedModel(copies=0), IDLE, {}, False, id="serving-nobody"),
        pytest.param(NamedModel(copies=0), IDLE, {"ready": True}, True, id="serving-nobody-but-careful"),
        pytest.param(NamedModel(copies=1, loaded=0), IDLE, {}, True, id="being-loaded"),
        pytest.param(MISSING, IDLE, {"ready": True}, False, id="gone"),
        pytest.param(NamedModel(copies=1, loaded=1), LOADED, {}, False, id="as-many"),
        pytest.param(NamedModel(copies=2, loaded=2), LOADED, {}, True, id="fewer"),
        pytest.param(NamedModel(copies=2, loaded=2), IDLE, {"force": True}, False, id="forced"),
    ],
)
def test_a_new_target_is_switched_to_at_once_only_where_nothing_is_lost(active, target, request_, moves):
    after = changed(VModelRecord("a", "a"), {"a": active, "b": target}, target="b", **request_)
    assert (after.moving, after.target) == (moves, "b")
    assert after.more.wait == (moves and "ready" in request_)


def test_the_same_target_again_changes_nothing():
    """A controller that repeats its request neither ends nor restarts a move. If the move has failed, it stays
    failed."""
    models = {"a": NamedModel(copies=0), "b": LOADED}
    for before in (VModelRecord("a", "a"), VModelRecord("a", "b"), VModelRecord("a", "b", failed=True)):
        change = changes.set_vmodel("v", before, models, SetVModel(target=before.target))
        assert isinstance(change, Change)
        assert change.nothing


def test_going_back_to_the_active_model_ends_a_move():
    """A request for the active model ends a move. The former target loses one reference, and the active model gains
    none."""
    before = VModelRecord("a", "b", failed=True, more=VModelMore(why="no room", wait=True))
    change = changes.set_vmodel("v", before, {"a": LOADED, "b": IDLE}, SetVModel(target="a"))
    assert isinstance(change, Change)
    assert change.after == VModelRecord("a", "a")
    assert change.refs == {"b": 0}


def test_another_target_takes_the_place_of_one_that_was_not_reached():
    """A new target replaces one that was not reached. The active model stays, and the reason of the failure is
    removed."""
    before = VModelRecord("a", "b", failed=True, more=VModelMore(why="no room"))
    models = {"a": LOADED, "b": replace(IDLE, auto_delete=True), "c": replace(IDLE, refs=4)}
    change = changes.set_vmodel("v", before, models, SetVModel(target="c"))
    assert isinstance(change, Change)
    assert (change.after, change.refs, change.deleted) == (VModelRecord("a", "c"), {"c": 5}, ("b",))


def test_a_model_that_others_refer_to_is_not_deleted_with_one_reference():
    """A model flagged for automatic deletion stays as long as another vmodel names it."""
    models = {"a": replace(LOADED, refs=2, auto_delete=True), "b": IDLE}
    change = changes.set_vmodel("v", VModelRecord("a", "a"), models, SetVModel(target="b", force=True))
    assert isinstance(change, Change)
    assert (change.refs, change.deleted) == ({"a": 1, "b": 2}, ())


def test_forcing_a_move_ends_it_with_one_reference():
    """ModelMesh counts the target of a forced move twice, so the target can never be unregistered."""
    change = changes.set_vmodel(
        "v", VModelRecord("a", "b", failed=True), {"a": LOADED, "b": IDLE}, SetVModel(target="b", force=True)
    )
    assert isinstance(change, Change)
    assert (change.after, change.refs) == (VModelRecord("b", "b"), {"a": 0})


def test_the_leader_ends_a_move_only_if_it_is_still_the_same():
    """Between the load and the write, a caller may have chosen another target or deleted the vmodel."""
    models = {"a": replace(LOADED, auto_delete=True), "b": LOADED}
    done = changes.finish_move(VModelRecord("a", "b", "me", True, VModelMore(why="x", wait=True)), models, "a", "b")
    assert (done.after, done.deleted) == (VModelRecord("b", "b", "me"), ("a",))
    for other in (None, VModelRecord("a", "c"), VModelRecord("c", "b"), VModelRecord("b", "b")):
        assert changes.finish_move(other, models, "a", "b").nothing
        assert changes.park_move(other, "a", "b", "why").nothing


def test_a_parked_move_says_why():
    """The reason of a failed move is stored beside ModelMesh's flag for failure, and is removed together with it."""
    parked = changes.park_move(VModelRecord("a", "b"), "a", "b", "no room").after
    assert parked == VModelRecord("a", "b", failed=True, more=VModelMore(why="no room"))
    assert changes.park_move(parked, "a", "b", "").after == VModelRecord("a", "b")


@pytest.mark.parametrize(
    ("record", "active", "target", "most", "due"),
    [
        (VModelRecord("a", "b"), NamedModel(copies=0), NamedModel(), None, True),
        (VModelRecord("a", "b", failed=True), NamedModel(copies=0), NamedModel(), None, False),
        (VModelRecord("a", "b", more=VModelMore(wait=True)), NamedModel(copies=0), NamedModel(), None, False),
        (VModelRecord("a", "b", more=VModelMore(wait=True)), NamedModel(copies=0), LOADED, None, True),
        (VModelRecord("a", "b"), NamedModel(copies=3, loaded=3), NamedModel(loaded=2), None, False),
        (VModelRecord("a", "b"), NamedModel(copies=3, loaded=3), NamedModel(loaded=2), 2, True),
        (VModelRecord("a", "b"), NamedModel(copies=3, loaded=3), NamedModel(loaded=0), 0, False),
        (VModelRecord("a", "b"), NamedModel(copies=1, loaded=0), NamedModel(loaded=1), None, True),
    ],
)
def test_a_move_ends_when_the_target_is_loaded_as_often(record, active, target, most, due):
    """A move ends when the target has as many loaded copies as the active model. Fewer are enough if no more fit, but
    not zero while the active model serves."""
    assert changes.due(record, active, target, most) is due


# --- versions, splits, mirrors ---


def rolled_out(*versions: str, keep: int | None = None) -> VModelRecord:
    """Returns a vmodel that has moved through these versions, in this order."""
    record, models = None, {f"m{version}": NamedModel() for version in versions}
    for version in versions:
        record = changed(record, models, target=f"m{version}", version=version, keep=keep, force=True)
    assert record is not None
    return record


def test_the_last_versions_are_kept():
    """A vmodel keeps its present version and a configurable number of earlier ones, two by default."""
    assert list(rolled_out("5", "6", "7", "8").more.versions) == ["6", "7", "8"]
    assert list(rolled_out("5", "6", "7", "8", keep=1).more.versions) == ["7", "8"]
    assert list(rolled_out("5", "6", keep=0).more.versions) == ["6"]


def test_a_version_that_is_too_old_loses_its_model():
    """A version that is too old is dropped, and a model that was registered with that version is deleted."""
    before = rolled_out("5", "6", "7")
    models = {"m5": NamedModel(refs=1, auto_delete=True), "m7": LOADED, "m8": NamedModel()}
    change = changes.set_vmodel("v", before, models, SetVModel(target="m8", version="8"))
    assert isinstance(change, Change)
    assert (change.deleted, change.refs) == (("m5",), {"m8": 1})


def test_a_version_that_serves_is_not_dropped_before_the_move_ends():
    """If no earlier versions are to be kept, the active model stays until its successor is loaded."""
    moving = changed(rolled_out("5", keep=0), {"m5": LOADED, "m6": IDLE}, target="m6", version="6")
    assert (list(moving.more.versions), moving.active) == (["5", "6"], "m5")
    change = changes.finish_move(moving, {"m5": replace(LOADED, auto_delete=True), "m6": LOADED}, "m5", "m6")
    assert change.after is not None
    assert (list(change.after.more.versions), change.deleted) == (["6"], ("m5",))


def test_going_back_leads_through_the_earlier_versions():
    record = rolled_out("6", "7", "8")
    models = {f"m{number}": LOADED for number in (6, 7, 8, 9)}
    for expected in ("m7", "m6"):
        record = changed(record, models, back=True)
        assert record.target == expected
    assert refused(record, models, back=True)[0] == "PRECONDITION"
    assert changed(record, models, version="8").target == "m8"


def test_a_version_after_going_back_follows_the_one_that_served():
    """If version 8 was bad and version 7 served again, a rollback from 9 leads to 7, not to 8."""
    record = changed(rolled_out("6", "7", "8"), {"m7": LOADED}, back=True, force=True)
    record = changed(record, {"m9": IDLE}, target="m9", version="9", force=True)
    assert list(record.more.versions) == ["8", "7", "9"]
    assert changed(record, {"m7": LOADED}, back=True).target == "m7"


def test_a_version_that_could_not_be_loaded_is_the_first_to_be_dropped():
    """A rollback skips a version that failed and was given up. That version is dropped before those that served."""
    models = {f"m{number}": LOADED for number in (1, 2, 3, 4)}
    record = changed(rolled_out("1", "2"), models | {"m3": IDLE}, target="m3", version="3")
    record = changed(replace(record, failed=True), models, version="2")
    assert (list(record.more.versions), record.target) == (["3", "1", "2"], "m2")
    assert changed(record, models, back=True).target == "m1"
    record = changed(record, models, target="m4", version="4", force=True)
    assert list(record.more.versions) == ["1", "2", "4"]


def test_a_version_names_one_model():
    """A version keeps its model, because clients may have written the version's name down."""
    record = rolled_out("7", "8")
    assert refused(record, {"x": IDLE}, target="x", version="7") == (
        "CONFLICT",
        "version 7 of v is already model m7: name another version",
    )
    assert changed(record, {"m7": LOADED, "m8": LOADED}, target="m7", version="7").target == "m7"


def test_weights_move_the_vmodel_to_the_heaviest():
    """The heaviest model becomes the target, so programs that do not know splits, such as ModelMesh, send all calls to
    the model that gets most of them."""
    models = {"a": LOADED, "b": LOADED}
    record = changed(VModelRecord("a", "a"), models, weights={"a": 90, "b": 10})
    assert (record.target, record.more.weights) == ("a", {"a": 90, "b": 10})
    assert changed(record, models, weights={"a": 5, "b": 5}).target == "a"
    assert changed(record, models, weights={"a": 10, "b": 90}).target == "b"
    assert changed(None, models, weights={"b": 1, "a": 1}).target == "b"


def test_another_target_ends_a_split_and_the_same_one_does_not():
    """A request for another target ends a split. A repeated request for the same target does not, so a controller
    cannot end a canary by repetition."""
    split = VModelRecord("a", "a", more=VModelMore(weights={"a": 90, "b": 10}))
    models = {"a": LOADED, "b": LOADED, "c": IDLE}
    assert changed(split, models, target="a").more.weights
    assert not changed(split, models, target="b").more.weights
    assert not changed(split, models, target="a", weights={}).more.weights
    assert refused(split, models, weights={f"m{n}": 1 for n in range(17)} | {"a": 9})[0] == "NOT_FOUND"
    many = {f"m{n}": 1 for n in range(17)}
    assert refused(split, models | dict.fromkeys(many, IDLE), weights=many)[0] == "INVALID"


def test_a_mirror_ends_when_the_vmodel_moves_to_it():
    """A mirror ends when the vmodel moves to its shadow, because that model then answers the calls itself."""
    record = changed(VModelRecord("a", "a"), {"a": LOADED, "b": IDLE}, mirror=Mirror("b", 10.0), sticky="x-user")
    assert (record.more.mirror, record.more.sticky) == (Mirror("b", 10.0), "x-user")
    assert changed(record, {"a": LOADED, "b": LOADED}, target="b").more.mirror is None
    assert changed(record, {"a": LOADED}, no_mirror=True, sticky="").more == VModelMore()


# --- deletion ---


def test_a_deletion_releases_every_model_once():
    """Deleting a vmodel releases each of its models once, whatever their roles. Models flagged for automatic deletion
    are deleted, and models without a record are skipped."""
    more = VModelMore({"1": "a", "2": "c"}, weights={"b": 1}, mirror=Mirror("gone", 1.0))
    models = {"a": replace(IDLE, auto_delete=True), "b": replace(IDLE, refs=3), "c": replace(IDLE, refs=0)}
    change = changes.delete_vmodel(VModelRecord("a", "b", "me", more=more), models, "me")
    assert (change.after, change.refs, change.deleted) == (None, {"b": 2, "c": 0}, ("a",))


def test_a_deletion_by_another_owner_has_no_effect():
    record = VModelRecord("a", "a", "me")
    assert changes.delete_vmodel(record, {"a": IDLE}, "you").nothing
    assert changes.delete_vmodel(None, {}, "").nothing
    assert changes.delete_vmodel(record, {"a": IDLE}, "").after is None


# --- counts, in every order and interleaving ---

MODELS = ["a", "b", "c", "d"]
VMODELS = ["v", "w", "x"]

names = st.sampled_from(MODELS)
requests = st.builds(
    SetVModel,
    target=st.sampled_from(["", *MODELS]),
    create=st.booleans(),
    version=st.sampled_from(["", "", "1", "2", "3"]),
    back=st.booleans(),
    force=st.booleans(),
    ready=st.booleans(),
    expected_target=st.sampled_from(["", "", "", *MODELS]),
    owner=st.sampled_from(["", "", "me", "you"]),
    keep=st.sampled_from([None, None, 0, 1]),
    weights=st.none() | st.none() | st.dictionaries(names, st.integers(1, 9), max_size=2),
    mirror=st.none() | st.none() | st.builds(Mirror, names, st.just(1.0)),
    no_mirror=st.booleans(),
)


class Registry(RuleBasedStateMachine):
    """Vmodels and models as etcd keeps them, and several writers whose reads may be outdated.

    A writer decides by what it has read. As in a transaction, its write succeeds only if none of the records that it
    replaces has changed since.
    """

    @initialize()
    def begin(self) -> None:
        self.vmodels: dict[str, tuple[int, VModelRecord]] = {}  # records with the revision of their last write
        self.models: dict[str, tuple[int, NamedModel]] = {}
        self.revision = 0
        self.pending: list[tuple[str, int, dict[str, int], Change]] = []  # decided and not written yet

    def _decide(self, vmodel: str, decide, late: bool) -> None:
        revision, before = self.vmodels.get(vmodel, (0, None))
        models = {model: found for model, (_, found) in self.models.items()}
        decided = decide(before, models)
        if isinstance(decided, Refusal) or decided.nothing:
            return
        # A transaction compares the records that it writes; of other models the writer has only read that they exist.
        touched = {model: self.models.get(model, (0, None))[0] for model in (*decided.refs, *decided.deleted)}
        if late:
            self.pending.append((vmodel, revision, touched, decided))
        else:
            self._write(vmodel, revision, touched, decided)

    @rule(vmodel=st.sampled_from(VMODELS), request=requests, late=st.booleans())
    def set(self, vmodel, request, late) -> None:
        self._decide(vmodel, lambda before, models: changes.set_vmodel(vmodel, before, models, request), late)

    @rule(vmodel=st.sampled_from(VMODELS), late=st.booleans())
    def delete(self, vmodel, late) -> None:
        self._decide(vmodel, lambda before, models: changes.delete_vmodel(before, models, ""), late)

    @rule(vmodel=st.sampled_from(VMODELS), late=st.booleans())
    def finish(self, vmodel, late) -> None:
        if vmodel in self.vmodels:
            _, record = self.vmodels[vmodel]
            active, target = record.active, record.target
            self._decide(vmodel, lambda now, models: changes.finish_move(now, models, active, target), late)

    @rule(vmodel=st.sampled_from(VMODELS), why=st.sampled_from(["", "no room"]), late=st.booleans())
    def park(self, vmodel, why, late) -> None:
        if vmodel in self.vmodels:
            _, record = self.vmodels[vmodel]
            self._decide(vmodel, lambda now, _: changes.park_move(now, record.active, record.target, why), late)

    @rule(model=names, auto_delete=st.booleans(), copies=st.integers(0, 2), loaded=st.integers(0, 2))
    def register(self, model, auto_delete, copies, loaded) -> None:
        """Registers a model. If the model exists, changes its copies, so that its record is written for another
        reason."""
        self.revision += 1
        _, known = self.models.get(model, (0, NamedModel(auto_delete=auto_delete)))
        self.models[model] = self.revision, replace(known, copies=max(copies, loaded), loaded=loaded)

    @rule(model=names)
    def unregister(self, model) -> None:
        """Unregisters a model unless a vmodel refers to it."""
        if model in self.models and not self.models[model][1].refs:
            del self.models[model]
            self.revision += 1

    @rule(data=st.data())
    def write(self, data) -> None:
        """Writes one of the decided changes, unless the reads that it is based on are outdated."""
        if not self.pending:
            return
        self._write(*self.pending.pop(data.draw(st.integers(0, len(self.pending) - 1))))

    def _write(self, vmodel: str, revision: int, touched: dict[str, int], change: Change) -> None:
        if self.vmodels.get(vmodel, (0, None))[0] != revision:
            return
        if any(self.models.get(model, (0, None))[0] != known for model, known in touched.items()):
            return
        self.revision += 1
        if change.created:
            self.models[change.created] = self.revision, NamedModel(auto_delete=True)
        for model, refs in change.refs.items():
            self.models[model] = self.revision, replace(self.models[model][1], refs=refs)
        for model in change.deleted:
            del self.models[model]
        if change.after is None:
            del self.vmodels[vmodel]
        else:
            self.vmodels[vmodel] = self.revision, change.after

    @invariant()
    def counts_are_the_vmodels_that_name_each_model(self) -> None:
        """Checks the reference counts against a recount of the records, however the writes were interleaved."""
        recounted = Counter(model for _, record in getattr(self, "vmodels", {}).values() for model in record.names())
        for model, (_, known) in getattr(self, "models", {}).items():
            assert known.refs == recounted[model], (model, known, self.vmodels)

    @invariant()
    def every_named_model_is_registered(self) -> None:
        """Checks that no model that a vmodel refers to was unregistered or deleted automatically."""
        for _, record in getattr(self, "vmodels", {}).values():
            assert record.names() <= self.models.keys(), (record, self.models)


Registry.TestCase.settings = settings(max_examples=examples(150), stateful_step_count=40, deadline=None)
TestCounts = Registry.TestCase


@given(requests, st.sampled_from([None, VModelRecord("a", "a"), VModelRecord("a", "b", "me")]), st.data())
def test_a_granted_request_can_be_repeated_without_effect(request_, before, data):
    """A client whose answer was lost sends its request again, and nothing may be counted or moved twice."""
    models = {model: NamedModel(refs=1, copies=1, loaded=data.draw(st.integers(0, 1))) for model in MODELS}
    request_ = replace(request_, back=False)
    change = changes.set_vmodel("v", before, models, request_)
    if isinstance(change, Refusal):
        return
    again = changes.set_vmodel("v", change.after, models, request_)
    assert isinstance(again, Change) or again.cause is RefusalCause.CONFLICT
    if isinstance(again, Change):
        assert again.after == change.after
        assert not again.refs
