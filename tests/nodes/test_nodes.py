"""The ONNX project's node tests through a mesh: results equal those of onnxruntime alone, or the docs give the reason
for a difference."""

import collections
import re
from pathlib import Path

import pytest

pytest.importorskip("onnx.backend.test.case.node", reason="the wheel onnx is not installed", exc_type=ImportError)

from mesh.pb import modelmesh_pb2
from tests.nodes import cases, ways
from tests.support.localmesh import LocalMesh

pytestmark = pytest.mark.nodes

DOCS = Path(__file__).parents[2] / "docs" / "onnx.md"

REFUSALS = (
    # the ways, a pattern of the error's text, and the explanation in docs/onnx.md
    ("", r"V2 can(not)? carry", "A model is not loaded if a required input, or every output, is of such a type"),
    ("gRPC typed", r"(FP16|BF16) has no typed contents", "FP16 and BF16 have no typed contents"),
    ("REST JSON", r"(FP16|BF16)", "FP16 and BF16 have no form in JSON"),
    ("REST JSON", r"(NaN|[Ii]nfinit)", "NaN and infinities have no form in JSON"),
)

_AT_ONCE = 4
_COUNT = 1500
"""The least number of cases; with fewer, the wheel has changed."""


def excused(way: str, text: str) -> str | None:
    """Returns the docs' text about a refusal, or None if they do not mention it."""
    for where, pattern, documented in REFUSALS:
        if where in ("", way) and re.search(pattern, text):
            return documented
    return None


def test_the_docs_list_what_is_refused() -> None:
    """docs/onnx.md lists every accepted reason for a refusal."""
    text = " ".join(DOCS.read_text().split())
    for _, _, documented in REFUSALS:
        assert documented in text


@pytest.mark.timeout(1800)
async def test_every_node_test_is_answered_as_by_onnxruntime_alone(tmp_path, etcd_server) -> None:
    """Sent in each of the four ways, every node test gets onnxruntime's own result, or is refused for a reason that
    docs/onnx.md lists or because V2 has no datatype for an input. Of random results, only names, datatypes and shapes
    are compared. If onnxruntime cannot load or run the model, the answer is an error."""
    tally: collections.Counter[str] = collections.Counter()
    wrong: list[str] = []

    async with LocalMesh(tmp_path, etcd_server, pods=1, capacity="512MiB") as mesh:
        by_way = ways.Ways(mesh).all()

        async def one(case: cases.Case) -> None:
            expected = cases.alone(case)
            await mesh.register(case.name, case.model)
            for way, ask in by_way.items():
                try:
                    found = await ask(case.name, case.inputs or ())
                except ways.Refusal as refusal:
                    if expected.problem:
                        tally[f"{way}: refused, as by onnxruntime"] += 1
                    elif (why := excused(way, refusal.text)) is not None:
                        tally[f"{way}: refused, {why}"] += 1
                    elif case.inputs is None:
                        tally[f"{way}: refused, its inputs cannot be sent"] += 1
                    else:
                        wrong.append(f"{case.name}, {way}: {refusal}")
                    continue
                if expected.problem:
                    wrong.append(f"{case.name}, {way}: answered, where onnxruntime says {expected.problem:.200}")
                elif case.inputs is None:
                    tally[f"{way}: answered without inputs that cannot be sent"] += 1
                elif expected.random:
                    tally[f"{way}: random"] += 1
                    if [(o.name, o.datatype, o.array.shape) for o in found] != [
                        (o.name, o.datatype, o.array.shape) for o in expected.outputs
                    ]:
                        wrong.append(f"{case.name}, {way}: other outputs")
                elif len(found) == len(expected.outputs) and all(map(cases.Tensor.same, found, expected.outputs)):
                    tally[f"{way}: equal"] += 1
                else:
                    wrong.append(f"{case.name}, {way}: {found} instead of {expected.outputs}"[:600])
            await mesh.management().unregisterModel(modelmesh_pb2.UnregisterModelRequest(modelId=case.name))

        found = list(cases.collect())
        await ways.in_turn([one(case) for case in found], _AT_ONCE)

    print()
    for what, count in sorted(tally.items()):
        print(f"{count:6} {what}")
    assert not wrong, f"{len(wrong)} wrong answers:\n" + "\n".join(wrong)
    assert len(found) >= _COUNT
    for way in by_way:
        assert tally[f"{way}: equal"] > _COUNT // 2
