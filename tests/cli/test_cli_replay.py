"""`mesh replay`: decisions from a pod or from a file are saved and repeated."""

import json

from placement.replay import Question, render
from placement.room import Need, ResidentCopy

QUESTION = Question("m", Need.of_host(10, 0, 100), 0, (ResidentCopy("a", 10, 5000), ResidentCopy("b", 10, 1000)))


def test_a_pods_decisions_are_saved_and_asked_again(run, mesh, tmp_path):
    """A decision that was saved by the same version of Mesh is repeated without a difference. If the saved record was
    changed, the difference is reported. A file without decisions is wrong usage."""
    line = render(QUESTION, QUESTION.ask())
    mesh.answer("/mesh/v1/pods/pod-1/decisions", {"decisions": [json.loads(line)]})
    path = tmp_path / "d.ndjson"
    result = run("replay", "pod-1", "--save", str(path))
    assert result.exit_code == 0, result.stderr
    assert "1 decisions, 0 would now be different" in result.stdout
    again = run("replay", str(path), "--json")
    assert json.loads(again.stdout) == {"decisions": 1, "different": []}
    path.write_text(line.replace('"victims":["a"]', '"victims":["b"]'))
    differs = run("replay", str(path))
    assert differs.exit_code == 1
    assert "evict b then, evict a now" in differs.stdout
    path.write_text("nonsense")
    assert run("replay", str(path)).exit_code == 2
