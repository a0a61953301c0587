"""Commands in the docs: a test runs each of them. The tests here also check how commands are found in the pages."""

from pathlib import Path

from tests.support import documented
from tests.support.documented import DOCS, RUN_BY, Command, Shell

PAGES = sorted(path.name for path in DOCS.glob("*.md") if documented.commands(path.name))


def test_each_block_is_run_by_somebody():
    """The table of documented commands lists exactly the existing blocks. The file with the test of each block exists
    and names the block's heading."""
    there = {(command.page, command.heading) for page in PAGES for command in documented.commands(page)}
    assert there == set(RUN_BY)
    for (page, heading), by in RUN_BY.items():
        where = DOCS.parent / by.test
        assert where.is_file(), by.test
        assert f'"{heading}"' in where.read_text(), f"{by.test} does not name {heading!r} of {page}"


def test_blocks_are_taken_apart(tmp_path, monkeypatch):
    """Blocks are parsed with prompts, continued lines, multi-line quotes, output between commands, here-documents and
    other languages."""
    text = """# Page
```yaml
$ not: one
```
## Console
```console
$ one --a \\
    --b
what it prints
$ two '{
  "b": 1}' | six
```
## Shell
```sh
three
four
```
```sh
five <<'END'
$ text
END
```
"""
    monkeypatch.setattr(documented, "DOCS", tmp_path)
    Path(tmp_path, "p.md").write_text(text)
    assert [(command.heading, command.text) for command in documented.commands("p.md")] == [
        ("Console", "one --a --b"),
        ("Console", "two '{\n  \"b\": 1}' | six"),
        ("Shell", "three"),
        ("Shell", "four"),
        ("Shell", "five <<'END'\n$ text\nEND"),
    ]


def test_words_are_put_in_place_of_the_examples():
    """Longer placeholders are replaced first, and what replaces one is not replaced again."""
    command = Command("p", "h", "mesh --ca ca.crt ls ca")
    assert command.put({"ca.crt": "/ca", "ca": "x"}) == "mesh --x /ca ls x"
    assert command.put({}) == command.text


def test_a_shell_keeps_what_is_exported(tmp_path):
    """A shell of the docs keeps exported variables from one command to the next, and fails as soon as a command
    fails."""
    shell = Shell(tmp_path / "here")
    assert shell.run("export WORD='a b'; echo said").stdout == "said\n"
    assert shell.run("echo $WORD; pwd").stdout == f"a b\n{tmp_path / 'here'}\n"
    assert shell.run("false; echo on").returncode == 1
