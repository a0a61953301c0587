"""The audit trail: its lines, its file, and what happens if the file cannot be written."""

import json
import os

import pytest

from router.access import audit, operations
from router.access.audit import Audit

LINE = {"who": "key:ci", "name": "fraud/de", "peer": "10.0.0.7", "result": "OK"}


@pytest.fixture
def file(tmp_path):
    return tmp_path / "audit.log"


def lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_a_change_is_one_line_of_json(file):
    trail = Audit(str(file), wall=lambda: 1_700_000_000.5)
    trail.note(operations.REGISTER, **LINE)
    trail.close()
    assert lines(file) == [
        {
            "time": "2023-11-14T22:13:20.500+00:00",
            "who": "key:ci",
            "what": "register",
            "name": "fraud/de",
            "from": "10.0.0.7",
            "result": "OK",
        }
    ]
    assert file.stat().st_mode & 0o777 == 0o600


def test_what_changes_nothing_has_no_line(file):
    trail = Audit(str(file))
    for operation in (operations.STATUS, operations.LIST, operations.KEYS, operations.GRANTS, operations.INFER):
        assert not audit.changes(operation)
        trail.note(operation, **LINE)
    trail.close()
    assert not lines(file)


def test_a_name_cannot_forge_a_line_or_grow_without_bound(file):
    trail = Audit(str(file))
    trail.note(operations.REGISTER, **{**LINE, "name": 'x"}\n{"who": "key:other"\ud800' + "y" * 10_000})
    trail.close()
    (line,) = lines(file)
    assert line["who"] == "key:ci"
    assert len(line["name"]) <= 300


def test_the_models_of_a_line_are_bounded(file):
    trail = Audit(str(file))
    trail.note(operations.SET_VMODEL, **LINE, models=["x" * 1000] * 1000)
    trail.close()
    (line,) = lines(file)
    assert len(line["models"]) == audit.MODELS
    assert all(len(one) <= 300 for one in line["models"])


def test_a_bulk_request_notes_every_change_and_some_refusals():
    """All changed models are noted, in lines of bounded length. Of the refused models, the first hundred are noted."""
    noted = []
    gathering = audit.Gathering(lambda models, result: noted.append((list(models), result)))
    for number in range(250):
        gathering.add(f"m{number}", "OK")
        gathering.add(f"other{number}", "FORBIDDEN" if number % 2 else "CONFLICT")
    gathering.end()
    changed = [one for models, result in noted if result == "OK" for one in models]
    refused = [one for models, result in noted if result != "OK" for one in models]
    assert changed == [f"m{number}" for number in range(250)]
    assert sorted(refused) == sorted(f"other{number}" for number in range(audit.REFUSED))
    assert max(len(models) for models, _ in noted) == audit.MODELS
    assert len(noted) == 5


def test_workers_append_to_one_file(file):
    trails = [Audit(str(file)) for _ in range(2)]
    for trail in trails * 3:
        trail.note(operations.UNREGISTER, **LINE)
    for trail in trails:
        trail.close()
    assert len(lines(file)) == 6


def test_a_rotated_file_is_opened_again(file):
    trail = Audit(str(file))
    trail.note(operations.REGISTER, **LINE)
    file.rename(file.with_suffix(".1"))
    trail.look()
    trail.note(operations.REGISTER, **LINE)
    trail.look()
    trail.note(operations.REGISTER, **LINE)
    trail.close()
    assert len(lines(file.with_suffix(".1"))) == 1
    assert len(lines(file)) == 2


def test_lines_go_to_the_log_while_the_file_cannot_be_written(file, monkeypatch):
    trail = Audit(str(file))
    said = []
    monkeypatch.setattr(audit.log, "info", lambda event, **more: said.append(more))
    monkeypatch.setattr(audit.log, "error", lambda event, **more: said.append(more))

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(os, "write", full)
        for _ in range(2):
            trail.note(operations.REGISTER, **LINE)
    assert said == [
        {"why": f"{file}: No space left on device"},
        *2 * [{"who": "key:ci", "what": "register", "name": "fraud/de", "from": "10.0.0.7", "result": "OK"}],
    ]
    trail.note(operations.REGISTER, **LINE)
    trail.close()
    assert len(lines(file)) == 1


def test_a_folder_that_vanished_is_reported_once_and_survived(tmp_path, monkeypatch):
    folder = tmp_path / "logs"
    folder.mkdir()
    trail = Audit(str(folder / "audit.log"))
    said = []
    monkeypatch.setattr(audit.log, "info", lambda event, **more: said.append(event))
    monkeypatch.setattr(audit.log, "error", lambda event, **more: said.append(more["why"]))
    (folder / "audit.log").unlink()
    folder.rmdir()
    for _ in range(3):
        trail.look()
    trail.note(operations.REGISTER, **LINE)
    assert said == [f"{folder}/audit.log: No such file or directory", "audit"]
    folder.mkdir()
    trail.look()
    trail.note(operations.REGISTER, **LINE)
    trail.close()
    assert len(lines(folder / "audit.log")) == 1


def test_a_file_that_cannot_be_opened_is_refused_at_the_start(tmp_path):
    with pytest.raises(OSError):
        Audit(str(tmp_path / "nothing" / "audit.log"))


def test_without_a_trail_nothing_is_written(monkeypatch):
    monkeypatch.setattr(audit.log, "info", lambda *_, **__: pytest.fail("a line was written"))
    Audit("off").note(operations.REGISTER, **LINE)
