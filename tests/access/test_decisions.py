"""The pure decision on who may do what, tested by a table and by properties."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.access import patterns
from mesh.access.grants import NONE, Grants, decide, grant
from mesh.access.principals import EVERYONE, Principal, check_subject
from mesh.access.verbs import ALLOWS, Role, Verb

CI = Principal("key:ci", ("group:team-a",))

TABLE = [
    # role, patterns, subjects, verb, name, allowed
    ("infer", ["fraud"], ["key:ci"], Verb.INFER, "fraud", True),
    ("infer", ["fraud"], ["key:ci"], Verb.READ, "fraud", False),
    ("infer", ["fraud"], ["key:ci"], Verb.REGISTER, "fraud", False),
    ("infer", ["fraud"], ["key:ci"], Verb.ADMIN, "fraud", False),
    ("read", ["fraud"], ["key:ci"], Verb.READ, "fraud", True),
    ("read", ["fraud"], ["key:ci"], Verb.INFER, "fraud", False),
    ("register", ["fraud"], ["key:ci"], Verb.REGISTER, "fraud", True),
    ("register", ["fraud"], ["key:ci"], Verb.READ, "fraud", True),
    ("register", ["fraud"], ["key:ci"], Verb.INFER, "fraud", False),
    ("admin", ["*"], ["key:ci"], Verb.ADMIN, "*", True),
    ("admin", ["fraud/*"], ["key:ci"], Verb.ADMIN, "*", False),
    ("admin", ["fraud/*"], ["key:ci"], Verb.REGISTER, "fraud/de", True),
    ("infer", ["*"], ["group:team-a"], Verb.INFER, "anything/at all", True),
    ("infer", ["*"], ["group:team-b"], Verb.INFER, "fraud", False),
    ("infer", ["*"], [EVERYONE], Verb.INFER, "fraud", True),
    ("infer", ["*"], ["key:c"], Verb.INFER, "fraud", False),
    ("infer", ["*"], ["user:ci"], Verb.INFER, "fraud", False),
    # an alias and its versions
    ("infer", ["fraud"], ["key:ci"], Verb.INFER, "fraud@7", True),
    ("infer", ["fraud"], ["key:ci"], Verb.INFER, "fraudulent@7", False),
    ("infer", ["fraud@7"], ["key:ci"], Verb.INFER, "fraud", False),
    ("infer", ["fraud@7"], ["key:ci"], Verb.INFER, "fraud@71", False),
    ("infer", ["a"], ["key:ci"], Verb.INFER, "a@b@c", True),
    ("infer", ["@7"], ["key:ci"], Verb.INFER, "@7", True),
    # lists by prefix
    ("read", ["fraud/*"], ["key:ci"], Verb.READ, patterns.listed("fraud/"), True),
    ("read", ["fraud/*"], ["key:ci"], Verb.READ, patterns.listed("fraud"), False),
    ("read", ["fraud/*"], ["key:ci"], Verb.READ, patterns.listed(""), False),
    ("read", ["*-eu"], ["key:ci"], Verb.READ, patterns.listed("fraud-eu"), False),
    ("read", ["fraud"], ["key:ci"], Verb.READ, patterns.listed("fraud@"), True),
    # encodings, case, Unicode: nothing but the very same text
    ("infer", ["fraud/de"], ["key:ci"], Verb.INFER, "fraud%2Fde", False),
    ("infer", ["fraud%2Fde"], ["key:ci"], Verb.INFER, "fraud/de", False),
    ("infer", ["Fraud"], ["key:ci"], Verb.INFER, "fraud", False),
    ("infer", ["caf\u00e9"], ["key:ci"], Verb.INFER, "cafe\u0301", False),
    ("infer", ["fraud/*"], ["key:ci"], Verb.INFER, "fraud/../other", True),
    ("infer", ["fraud/*"], ["key:ci"], Verb.INFER, "fraud", False),
    ("infer", ["a?c"], ["key:ci"], Verb.INFER, "abc", False),
    ("infer", ["[ab]"], ["key:ci"], Verb.INFER, "a", False),
    ("infer", ["a.c"], ["key:ci"], Verb.INFER, "abc", False),
    ("infer", ["a*"], ["key:ci"], Verb.INFER, "a\nb", True),
    ("infer", ["fraud"], ["key:ci"], Verb.INFER, "fraud\n", False),
    ("infer", ["fraud"], ["key:ci"], Verb.INFER, "fraud\0", False),
]


@pytest.mark.parametrize(("role", "models", "to", "verb", "name", "allowed"), TABLE)
def test_the_table_of_decisions(role, models, to, verb, name, allowed):
    ruling = decide(Grants({"one": grant(role, models, to)}), CI, verb, name)
    assert ruling.allowed is allowed
    assert ("the grant one" in ruling.why) is allowed


def test_each_role_allows_only_its_verbs():
    for role in Role:
        grants = Grants({"one": grant(role, ["*"], ["key:ci"])})
        allowed = {verb for verb in Verb if decide(grants, CI, verb, "m").allowed}
        assert allowed == ALLOWS[role] | {Verb.PUBLIC, Verb.KNOWN}


def test_a_refusal_says_who_lacks_which_role_on_what():
    ruling = decide(NONE, CI, Verb.REGISTER, "fraud/de")
    assert ruling.why == "key:ci has no grant of register or admin on fraud/de"
    assert decide(NONE, CI, Verb.ADMIN, "*").why == "key:ci has no grant of admin on all models (*)"


@pytest.mark.parametrize(
    ("parts", "why"),
    [
        (("owner", ["*"], ["key:a"]), "is not a role: use one of infer, read, register, admin"),
        (("infer", [], ["key:a"]), "1 to 100 patterns"),
        (("infer", ["*"], []), "1 to 100 subjects"),
        (("infer", [""], ["key:a"]), "the pattern '' has 0 characters, but it must have from 1"),
        (("infer", [7], ["key:a"]), "a pattern must be a string"),
        (("infer", ["x" * 600], ["key:a"]), "has 600 characters, but it must have from 1"),
        (("infer", ["\ud800"], ["key:a"]), "a pattern contains half of a surrogate pair"),
        (("infer", ["*"], ["ci"]), "is not a subject"),
        (("infer", ["*"], ["key:"]), "is not a subject"),
        (("infer", ["*"], ["key:a\nb"]), "cannot be printed"),
        (("infer", ["*"], ["key:a\u00a0b"]), "unusual spaces"),
        (("infer", ["*"], ["bootstrap:admin"]), "is not a subject"),
        (("infer", ["*"], ["serviceaccount:batch"]), "write serviceaccount:NAMESPACE:NAME"),
        (("infer", ["*"], ["serviceaccount:a:b:c"]), "write serviceaccount:NAMESPACE:NAME"),
        (("infer", ["*"], ["system:serviceaccount:a:b"]), "write serviceaccount:a:b"),
    ],
)
def test_a_bad_grant_is_refused(parts, why):
    with pytest.raises(ValueError, match=re.escape(why)):
        grant(*parts)


# -- properties

TEXT = st.text(alphabet="ab@/*%2Fé", max_size=8)
NAMES = st.text(alphabet="ab@/%2Fé", min_size=1, max_size=8)
SUBJECTS = st.sampled_from(["key:a", "key:b", "group:g", "user:u", EVERYONE])
GRANTS = st.builds(
    grant,
    st.sampled_from(Role),
    st.lists(TEXT.filter(bool), min_size=1, max_size=3),
    st.lists(SUBJECTS, min_size=1, max_size=3),
)
SETS = st.dictionaries(st.sampled_from("pqrs"), GRANTS, max_size=4)
PRINCIPALS = st.builds(
    Principal, st.sampled_from(["key:a", "key:b", "user:u"]), st.lists(st.just("group:g"), max_size=1)
)
VERBS = st.sampled_from([Verb.INFER, Verb.READ, Verb.REGISTER, Verb.ADMIN])


def allowed_by_definition(grants, principal, verb, name):
    """Returns the decision by its definition, written with regular expressions."""
    for one in grants.values():
        if principal.subjects & set(one.to) and verb in ALLOWS[one.role]:
            for pattern in one.models:
                expression = ".*".join(map(re.escape, pattern.split("*")))
                if re.fullmatch(f"(?:{expression})(?:(?<=.)@.*)?", name, re.DOTALL):
                    return True
    return False


@given(SETS, PRINCIPALS, VERBS, NAMES)
def test_a_decision_is_what_the_definition_says(grants, principal, verb, name):
    ruling = decide(Grants(grants), principal, verb, name)
    assert ruling.allowed == allowed_by_definition(grants, principal, verb, name)


@given(PRINCIPALS, VERBS, NAMES)
def test_nothing_is_allowed_without_a_grant(principal, verb, name):
    assert not decide(NONE, principal, verb, name).allowed


@given(SETS, GRANTS, PRINCIPALS, VERBS, NAMES)
def test_another_grant_never_denies_what_was_allowed(grants, more, principal, verb, name):
    before = decide(Grants(grants), principal, verb, name).allowed
    assert decide(Grants(grants | {"more": more}), principal, verb, name).allowed >= before


@given(SETS, VERBS, NAMES)
def test_further_subjects_never_deny_what_was_allowed(grants, verb, name):
    alone = decide(Grants(grants), Principal("key:a"), verb, name).allowed
    assert decide(Grants(grants), Principal("key:a", ["group:g"]), verb, name).allowed >= alone


@given(TEXT, st.text(alphabet="ab@/", max_size=5), st.text(alphabet="ab@/*", max_size=5))
def test_a_pattern_that_covers_a_list_covers_each_name_in_it(pattern, prefix, rest):
    if patterns.covers(pattern, patterns.listed(prefix)):
        assert patterns.covers(pattern, prefix + rest)


@given(st.text(min_size=1, max_size=8), st.text(min_size=1, max_size=8))
def test_a_pattern_without_a_star_matches_only_itself(pattern, name):
    if "*" not in pattern:
        assert patterns.matches(pattern, name) == (pattern == name)


def test_a_pattern_with_many_stars_is_matched_quickly():
    assert not patterns.matches("*a" * 250 + "b", "a" * 10_000)


def test_subjects_have_a_kind():
    assert check_subject("user:Jo Doe <jo@example.com>") == "user:Jo Doe <jo@example.com>"
    assert check_subject(EVERYONE) == EVERYONE
