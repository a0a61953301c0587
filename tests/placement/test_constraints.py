"""Type constraints: the meaning of ModelMesh's JSON, and the refusal of anything else."""

import contextlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from placement.constraints import ANYWHERE, NONE, Constraint, Constraints, parse, render

labels = st.frozensets(st.sampled_from(["gpu", "large", "eu", "none"]), max_size=3)
entries = st.fixed_dictionaries(
    {}, optional={"required": labels.map(sorted), "preferred": labels.map(sorted), "later": st.integers()}
)
documents = st.dictionaries(st.sampled_from(["onnx", "xgboost", "_default", "ünï", ""]), entries)


def test_the_example_of_modelmesh():
    """ModelMesh's example keeps its meaning: all required labels, any preferred one, and `_default` for types that are
    not listed."""
    constraints = parse(
        '{"type-a": {"required": ["l1","l2"]}, "type-b": {"preferred": ["l3"]}, "_default": {"required": ["none"]}}'
    )
    assert constraints.of("type-a").lacking(frozenset({"l1"})) == {"l2"}
    assert constraints.allows("type-a", frozenset({"l1", "l2", "x"}))
    assert constraints.allows("type-b", frozenset())
    assert constraints.of("type-b").prefers(frozenset({"l3", "x"}))
    assert not constraints.allows("other", frozenset({"l1"}))
    assert constraints.allows("other", frozenset({"none"}))


@given(documents)
def test_whatever_is_read_is_written_as_the_same(document):
    """Parsing, rendering and parsing again gives equal constraints, and each entry keeps its meaning."""
    constraints = parse(json.dumps(document))
    assert parse(render(constraints)) == constraints
    for name, entry in document.items():
        constraint = constraints.default if name == "_default" else constraints.of(name)
        assert constraint.required == frozenset(entry.get("required", ()))
        assert constraint.preferred == frozenset(entry.get("preferred", ())) - constraint.required


@given(documents, labels)
def test_a_type_is_allowed_where_all_that_it_requires_is(document, pod):
    constraints = parse(json.dumps(document))
    for name in ("onnx", "xgboost", "unlisted"):
        entry = document.get(name, document.get("_default", {}))
        assert constraints.allows(name, pod) == (set(entry.get("required", ())) <= pod)


@given(st.text(max_size=200) | st.binary(max_size=200))
def test_anything_else_is_a_value_error_or_read(text):
    """Any text is either read or refused with ValueError, never with another error."""
    with contextlib.suppress(ValueError):
        assert isinstance(parse(text), Constraints)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        pytest.param("[]", "not a JSON object", id="list"),
        pytest.param("{", "not JSON", id="broken"),
        pytest.param('{"a": ["gpu"]}', "type 'a' is not an object", id="labels-alone"),
        pytest.param('{"a": {"required": "gpu"}}', "required labels of type 'a'", id="text-for-list"),
        pytest.param('{"a": {"preferred": [""]}}', "preferred labels of type 'a'", id="empty-label"),
        pytest.param("[" * 100_000, "not JSON", id="deep"),
        pytest.param(" " * (2 << 20), "longer than", id="long"),
    ],
)
def test_errors_say_what_is_wrong(text, why):
    with pytest.raises(ValueError, match=why):
        parse(text)


@pytest.mark.parametrize("text", ["", "  \n", "{}", b""])
def test_nothing_asks_nothing(text):
    """Without constraints every pod may hold every type, and no pod is preferred."""
    assert parse(text) == NONE
    assert NONE.of("any") == ANYWHERE
    assert NONE.preferences("any", [frozenset(), frozenset({"gpu"})]) == {frozenset(): False, frozenset({"gpu"}): False}


def test_a_preference_is_inferred_for_pods_that_others_may_not_use():
    """A type without a stated preference is assumed to prefer pods that exclude more of the other types. A stated
    preference overrides this."""
    gpu, both, plain = frozenset({"gpu"}), frozenset({"gpu", "large"}), frozenset[str]()
    constraints = Constraints({"llm": Constraint(frozenset({"gpu"})), "tree": ANYWHERE})
    assert constraints.preferences("tree", [gpu, plain]) == {gpu: False, plain: True}
    assert constraints.preferences("llm", [gpu, both]) == {gpu: False, both: False}
    stated = Constraints({"tree": Constraint(preferred=frozenset({"gpu"})), "llm": Constraint(frozenset({"gpu"}))})
    assert stated.preferences("tree", [gpu, plain]) == {gpu: True, plain: False}
