"""Tests of the language check with texts that follow its rules, and texts that break them."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def language() -> ModuleType:
    """The check, loaded from its script, which is not in a package."""
    path = Path(__file__).parents[2] / ".ci" / "language.py"
    spec = importlib.util.spec_from_file_location("language", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def found(language: ModuleType, text: str, name: str = "mesh/x.py") -> list[tuple[int, str]]:
    return [(finding.line, finding.text) for finding in language.check(Path(name), text)]


@pytest.mark.parametrize(
    "text",
    [
        pytest.param('def f():\n    """Returns it."""\n', id="function"),
        pytest.param('async def f():\n    """Waits for it."""\n', id="coroutine"),
        pytest.param('class C:\n    """A thing."""\n', id="class"),
        pytest.param('"""Single-flight loading of models."""\n', id="module"),
        pytest.param('class C:\n    @property\n    def p(self):\n        """The port."""\n', id="property"),
        pytest.param('class C:\n    @property\n    def p(self):\n        """Returns it."""\n', id="property, verb"),
        pytest.param('typer.Option(min=0.1, help="Lease time to live, in seconds.")\n', id="help"),
        pytest.param('typer.Option(help="Print JSON, for programs.")\n', id="help, imperative"),
        pytest.param('x = "manew"  # a word inside of another\n', id="words"),
        pytest.param(
            "# Replaces the file by a rename, and its content with the result.\n", id="replaced by what means"
        ),
        pytest.param('def f(of):\n    """Takes the lock."""\n', id="a docstring with the verb of an opening"),
        pytest.param('x = "made anew"  # COMPAT: ModelMesh says so\n', id="a text that is fixed"),
    ],
)
def test_what_follows_the_rules_is_not_found(language: ModuleType, text: str) -> None:
    assert found(language, text) == []


@pytest.mark.parametrize(
    ("text", "line", "named"),
    [
        pytest.param('def f():\n    """What ends it."""\n', 2, "What", id="headless"),
        pytest.param('def f():\n    """The port."""\n', 2, "The", id="noun phrase for a function"),
        pytest.param('def f():\n    """Return it."""\n', 2, "Return", id="imperative for a function"),
        pytest.param('class C:\n    """How it is."""\n', 2, "How", id="headless class"),
        pytest.param('"""Whether it ends."""\n', 1, "Whether", id="headless module"),
        pytest.param('class C:\n    @property\n    def p(self):\n        """Of it."""\n', 4, "Of", id="property"),
        pytest.param("x = 1\n# it is made anew\n", 2, "anew", id="comment"),
        pytest.param("# is told\n# of it\n", 1, "told of", id="over two lines"),
        pytest.param("# Replaces an estimate\n# by a measurement.\n", 1, "with Y", id="replaced by a thing"),
        pytest.param("# the former and the latter\n", 1, "the latter", id="the latter"),
        pytest.param("# `deep` tells whether it ends.\n", 1, "is true if", id="an argument that tells"),
        pytest.param('def f():\n    """Tells whether it ends."""\n', 2, "Returns whether", id="tells whether"),
        pytest.param('def f(of):\n    """Takes `of`, a number."""\n', 2, "Takes `", id="a list of arguments"),
        pytest.param('typer.Option(help="Of eviction.")\n', 1, "Of", id="headless help"),
        pytest.param('typer.Option(help="Prints JSON.")\n', 1, "Prints", id="help in the third person"),
        pytest.param('typer.Option(help="Lease time to live")\n', 1, "full stop", id="no full stop"),
        pytest.param('typer.Option(min=0.1, help="Longest wait for a load.")\n', 1, "unit", id="no unit"),
        pytest.param('typer.Option(metavar="SECONDS", help="Longest wait.")\n', 1, "unit", id="no unit of a time"),
    ],
)
def test_what_breaks_a_rule_is_found_at_its_line(language: ModuleType, text: str, line: int, named: str) -> None:
    findings = found(language, text)
    assert [number for number, _ in findings] == [line]
    assert named in findings[0][1]


def test_words_are_looked_for_in_pages_too(language: ModuleType) -> None:
    assert found(language, "# A page\n\nIt is read anew.\n", "docs/x.md") == [
        (3, '"anew" is not a word of ours: again')
    ]


@pytest.mark.parametrize("text", ["Of both kinds.", "It goes there too.", "And the others stay."])
def test_docstrings_of_tests_stand_alone(language: ModuleType, text: str) -> None:
    """The docstring of a test must not continue the test's name or the docstring before it."""
    (finding,) = found(language, f'def test_x():\n    """{text}"""\n', "tests/x.py")
    assert finding[0] == 2
    assert "stands alone" in finding[1]


@pytest.mark.parametrize("text", ["Of both kinds.", "The server of a test.", "Never runs."])
def test_docstrings_of_helpers_in_tests_begin_with_a_verb(language: ModuleType, text: str) -> None:
    (finding,) = found(language, f'def helper():\n    """{text}"""\n', "tests/x.py")
    assert "verb in the third person" in finding[1]


@pytest.mark.parametrize("decorator", ["pytest.fixture", 'pytest_asyncio.fixture(scope="module")', "st.composite"])
def test_docstrings_of_fixtures_and_strategies_may_be_noun_phrases(language: ModuleType, decorator: str) -> None:
    assert found(language, f'@{decorator}\ndef helper():\n    """A server."""\n', "tests/x.py") == []


@pytest.mark.parametrize("text", ["A draining pod loads nothing.", "When a pod ends, its copies go.", "Refuses lists."])
def test_docstrings_of_tests_have_any_form_of_a_sentence(language: ModuleType, text: str) -> None:
    """The docstring of a test may begin with the actor, a condition or a verb."""
    assert found(language, f'def test_x():\n    """{text}"""\n', "tests/x.py") == []


def test_a_finding_is_printed_so_that_editors_find_it(language: ModuleType) -> None:
    assert str(language.Finding(Path("a.py"), 3, "why")) == "a.py:3: why"


def test_a_tree_without_git_is_checked_too(language: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    with_git = set(language.files(["placement"]))

    def missing(*command: object, **more: object) -> None:
        raise FileNotFoundError("git")

    monkeypatch.setattr(language.subprocess, "run", missing)
    assert set(language.files(["placement"])) >= with_git
    assert Path("README.md") in language.files([])
    assert not [path for path in language.files([]) if ".venv" in path.parts]
