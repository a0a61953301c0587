"""The fleet on disk: a folder with a manifest that describes each model, its inputs and its size.

    <folder>/manifest.json   every model, ordered by id
    <folder>/models/*.onnx   the files; `path` of a sample
    <folder>/rows/*.npy      rows for requests

The folder has everything needed to register the models, to call them and to check the answers.
"""

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
TYPE = "onnx"


@dataclass(frozen=True, slots=True)
class Tensor:
    """An input, as V2 describes it."""

    name: str
    datatype: str
    shape: tuple[int, ...]  # -1: variable


@dataclass(frozen=True, slots=True)
class Sample:
    """One model of the fleet."""

    id: str
    path: Path  # absolute
    inputs: tuple[Tensor, ...]
    dataset: str  # its rows: `rows/<dataset>.npy`
    bytes: int  # of the file
    memory: int  # estimated size when loaded, for sizing pods before anything is measured
    sha256: str
    recipe: str  # how it was made; if this changes, it has to be made again
    licence: str
    source: str  # for people

    @property
    def type(self) -> str:
        """The type with which the model is registered."""
        return TYPE


@dataclass(frozen=True, slots=True)
class Fleet:
    """The models in a folder."""

    directory: Path
    models: tuple[Sample, ...]
    missing: tuple[str, ...] = ()  # requested models that are not available, each with the reason, as a sentence

    @property
    def memory_bytes(self) -> int:
        """Estimated memory of all models, loaded into ONNX Runtime."""
        return sum(sample.memory for sample in self.models)

    def capacity_bytes(self, pods: int, share: float = 0.1) -> int:
        """Returns the capacity that each pod needs, so that all pods together hold about `share` of the fleet.

        It is always enough for the largest model.
        """
        largest = max((sample.memory for sample in self.models), default=0)
        return max(int(self.memory_bytes * share / pods), largest + largest // 4)

    @classmethod
    def load(cls, directory: Path) -> "Fleet":
        """Reads a folder's manifest. Raises ValueError if it is missing or not valid."""
        path = directory / MANIFEST
        try:
            data = json.loads(path.read_bytes())
            models = tuple(_sample(directory, entry) for entry in data["models"])
            return cls(directory.absolute(), models, tuple(data.get("missing", ())))
        except OSError as error:
            raise ValueError(f"{path} cannot be read: {error.strerror}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is not the manifest of a fleet: {error!r}") from error

    def save(self) -> None:
        """Writes the manifest, completely or not at all."""
        entries = []
        for sample in sorted(self.models, key=lambda sample: sample.id):
            entry = asdict(sample)
            entry["file"] = entry.pop("path").relative_to(self.directory).as_posix()
            entry["type"] = sample.type
            entries.append(entry)
        text = json.dumps({"models": entries, "missing": self.missing}, indent=1) + "\n"
        partial = self.directory / f"{MANIFEST}.{os.getpid()}"
        partial.write_text(text)
        partial.replace(self.directory / MANIFEST)

    def chosen(self, ids: Iterable[str]) -> "Fleet":
        """Returns a fleet in the same folder with only the given models."""
        wanted = frozenset(ids)
        return Fleet(self.directory, tuple(sample for sample in self.models if sample.id in wanted), self.missing)


def _sample(directory: Path, entry: Mapping[str, Any]) -> Sample:
    return Sample(
        id=str(entry["id"]),
        path=(directory / entry["file"]).absolute(),
        inputs=tuple(Tensor(i["name"], i["datatype"], tuple(i["shape"])) for i in entry["inputs"]),
        dataset=str(entry["dataset"]),
        bytes=int(entry["bytes"]),
        memory=int(entry["memory"]),
        sha256=str(entry["sha256"]),
        recipe=str(entry["recipe"]),
        licence=str(entry["licence"]),
        source=str(entry["source"]),
    )
