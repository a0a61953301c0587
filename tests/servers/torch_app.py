"""Makes models in TorchServe's Python, and writes their paths and torch's own answers into `answers.json`.

Run as `python torch_app.py FOLDER`.
"""

import json
import sys
import zipfile
from pathlib import Path
from typing import Tuple  # noqa: UP035 # torch 1.13 knows no other

import torch

ROWS = [[0.5, -1.25, 3.0, 0.0], [1e-3, 2.0, -7.5, 1.0], [4.0, 4.0, 4.0, 4.0]]


class Net(torch.nn.Module):
    """A small network with one input and one output."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.softmax(self.linear(x), 1)


class Pair(torch.nn.Module):
    """A function of two inputs, whose order matters, with two outputs of different types."""

    def forward(self, left: torch.Tensor, right: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:  # noqa: UP006
        difference = left - 2 * right
        return difference, difference > 0


class Writes(torch.nn.Module):
    """A model that overwrites a file of the pod: the reason why TorchScript counts as code."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        file = torch.from_file("WHERE", True, 4)
        file.copy_(x.flatten()[:4])
        return file


OIP = """
import os, torch

class Handler:
    def initialize(self, context):
        assert context.manifest["model"]["handler"] == "own.py"
        self.model = torch.jit.load(os.path.join(context.system_properties["model_dir"], "net.pt"))

    def handle(self, data, context):
        answers = []
        for row in data:
            if "data" in row:
                answers.append(bytes(row["data"])[::-1])
                continue
            (given,) = row["body"]["inputs"]
            made = self.model(torch.tensor(given["data"]).reshape(given["shape"]))
            output = {"name": "p", "datatype": "FP32", "shape": list(made.shape), "data": made.tolist()}
            answers.append({"id": "x", "model_name": "y", "model_version": "1.0", "outputs": [output]})
        return answers
"""

EAGER = """
import torch
from ts.torch_handler.base_handler import BaseHandler
from deep.scale import FACTOR

class Own(BaseHandler):
    def preprocess(self, data):
        (given,) = data[0]["body"]["inputs"]
        return torch.tensor(given["data"]).reshape(given["shape"])

    def postprocess(self, data):
        return [(data * FACTOR).tolist()]
"""

MODEL = """
import torch

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(4, 3)

    def forward(self, x):
        return torch.softmax(self.linear(x), 1)
"""

BROKEN = """
class Handler:
    def initialize(self, context):
        raise ValueError("these weights are of another model")

    def handle(self, data, context):
        return data
"""


def archive(path: Path, model: "dict[str, str]", files: "dict[str, bytes]") -> Path:
    """Writes a `.mar`, as torch-model-archiver does."""
    manifest = {"createdOn": "01/01/2026 00:00:00", "runtime": "python", "archiverVersion": "0.12.0"}
    manifest["model"] = {"modelName": "any", "modelVersion": "1.0", **model}  # type: ignore[assignment]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as made:
        for name, content in files.items():
            made.writestr(name, content)
        made.writestr("MAR-INF/MANIFEST.json", json.dumps(manifest))
    return path


def main() -> None:
    folder = Path(sys.argv[1])
    torch.manual_seed(7)
    net = Net().eval()
    rows = torch.tensor(ROWS)
    with torch.no_grad():
        answer = net(rows).flatten().tolist()
    script = folder / "net.pt"
    torch.jit.script(net).save(str(script))
    traced = folder / "traced"
    (traced / "3").mkdir(parents=True)
    torch.jit.trace(net, rows).save(str(traced / "3" / "model.pt"))
    torch.jit.script(Pair()).save(str(folder / "pair.pt"))
    torch.save(net, str(folder / "pickled.pt"))
    torch.save(net.state_dict(), str(folder / "weights.pt"))
    program = folder / "writes.py"
    program.write_text(Path(__file__).read_text().replace("WHERE", str(folder / "written")))
    sys.path.insert(0, str(folder))
    import writes

    torch.jit.script(writes.Writes()).save(str(folder / "writes.pt"))
    own = archive(folder / "own.mar", {"handler": "own.py"}, {"own.py": OIP.encode(), "net.pt": script.read_bytes()})
    eager = archive(
        folder / "eager.mar",
        {"handler": "eager.py", "modelFile": "net.py", "serializedFile": "weights.pt"},
        {
            "eager.py": EAGER.encode(),
            "net.py": MODEL.encode(),
            "deep/__init__.py": b"",
            "deep/scale.py": b"FACTOR = 2",
            "weights.pt": (folder / "weights.pt").read_bytes(),
        },
    )
    with zipfile.ZipFile(folder / "zipped.zip", "w") as made:
        made.write(script, "any/model.pt")
    archive(folder / "broken.mar", {"handler": "own.py"}, {"own.py": BROKEN.encode()})
    paths = {"script": script, "traced": traced, "zipped": folder / "zipped.zip", "own": own, "eager": eager}
    answers = {
        name: {
            "path": str(path),
            "type": "pytorch-mar" if name in ("own", "eager") else "pytorch",
            "answer": [2 * one for one in answer] if name == "eager" else answer,
        }
        for name, path in paths.items()
    }
    (folder / "answers.json").write_text(json.dumps(answers))


if __name__ == "__main__":
    main()
