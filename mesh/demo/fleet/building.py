"""Building a fleet in a folder: training the missing models with all cores, and fetching the larger ones.

A model is kept if its recipe and its bytes match the manifest, so a second build takes milliseconds. The text of a
recipe contains the versions of the libraries, because other versions may produce other bytes.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import os
import queue
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from mesh.demo.fleet import datasets, wheels
from mesh.demo.fleet.catalogue import Fleet, Sample, Tensor
from mesh.demo.fleet.recipes import Recipe, recipe
from mesh.host import cpus
from mesh.process import python

REVISION = 1
"""Revision of `training`. It changes when the same recipe gives other bytes."""

_LIBRARIES = ("scikit-learn", "skl2onnx", "onnx", "numpy")
_ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
"""Environment of workers: one thread in each, so that sums have a fixed order."""

_LICENCE = "Apache-2.0"  # of the models trained here

console = Console(stderr=True)


_SESSION_BYTES = 100_000
_FACTORS = {"forest": 6, "extra-trees": 6, "boosting": 8.5, "tree": 7}
"""Factors by kind of model, to estimate its memory; other kinds have the factor 3. A session of ONNX Runtime (no arena,
after a call) takes about _SESSION_BYTES plus the size of its file times the factor. Measured with mallinfo2 over 400
models: the sum is accurate to a tenth, each model to a half."""


class BuildError(Exception):
    """The reason why a fleet cannot be built."""


def build(
    directory: Path, count: int = 6, *, jobs: int = 0, with_wheels: bool = False, progress: bool = False
) -> Fleet:
    """Builds a fleet of the first `count` models, and of the larger models if `with_wheels` is true. Keeps models that
    the folder already contains.

    `jobs` 0 means one job for each core that may be used. With `progress`, a progress bar is drawn on standard error.
    Blocks. Raises BuildError. If a larger model is not available, the fleet's `missing` says why, and a warning is
    printed.
    """
    directory = directory.absolute()
    directory.mkdir(parents=True, exist_ok=True)
    known = _known(directory)
    versions = _versions()
    wanted = {made.id: made for made in (recipe(number) for number in range(count))}
    texts = {made.id: _text(made, versions) for made in wanted.values()}
    kept = [s for s in known.values() if s.id in wanted and s.recipe == texts[s.id] and _intact(s)]
    todo = [made for made in wanted.values() if made.id not in {sample.id for sample in kept}]
    names = sorted({made.dataset for made in wanted.values()})
    rows = [name for name in names if not datasets.rows_file(directory, name).exists()]

    samples = list(kept)
    try:
        if todo or rows:
            with _bar(progress, len(todo)) as advance:
                for made in _trained(directory, todo, rows, jobs or cpus.available()):
                    samples.append(_sample(directory, made, texts[made.id]))
                    advance()
    finally:
        # After an interruption the next build continues with the models made so far.
        others = [s for s in known.values() if s.id not in {sample.id for sample in samples} and _intact(s)]
        Fleet(directory, (*samples, *others)).save()

    missing: list[str] = []
    if with_wheels:
        fetched, missing = wheels.fetch(directory, {s.id: s for s in known.values() if _intact(s)})
        samples += fetched
        for sentence in missing:
            console.print(f"[bold yellow]WARNING: {sentence}. The fleet is built without it.[/]", highlight=False)
    fleet = Fleet(directory, tuple(sorted(samples, key=lambda sample: sample.id)), tuple(missing))
    fleet.save()
    return fleet


def _known(directory: Path) -> dict[str, Sample]:
    try:
        return {sample.id: sample for sample in Fleet.load(directory).models}
    except ValueError:
        return {}  # the first build, or an incompatible manifest: everything is made again


def _versions() -> str:
    try:
        return " ".join(f"{name}={importlib.metadata.version(name)}" for name in _LIBRARIES)
    except importlib.metadata.PackageNotFoundError as error:
        text = f"{error.name} is not installed: run `pip install '.[demo]'` in a checkout of Mesh"
        raise BuildError(text) from error


def _text(made: Recipe, versions: str) -> str:
    return f"{REVISION} {json.dumps(asdict(made), sort_keys=True)} {versions}"


def _intact(sample: Sample) -> bool:
    try:
        content = sample.path.read_bytes()
    except OSError:
        return False
    return hashlib.sha256(content).hexdigest() == sample.sha256


def _sample(directory: Path, made: Recipe, text: str) -> Sample:
    path = directory / "models" / f"{made.id}.onnx"
    content = path.read_bytes()
    return Sample(
        id=made.id,
        path=path,
        inputs=(Tensor("input", "FP64" if made.doubles else "FP32", (-1, datasets.FEATURES[made.dataset])),),
        dataset=made.dataset,
        bytes=len(content),
        memory=int(_SESSION_BYTES + _FACTORS.get(made.kind, 3) * len(content)),
        sha256=hashlib.sha256(content).hexdigest(),
        recipe=text,
        licence=_LICENCE,
        source=f"{made.kind} trained on {datasets.ORIGINS[made.dataset]}",
    )


@contextlib.contextmanager
def _bar(shown: bool, total: int) -> Iterator[Callable[[], None]]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not shown) as bar:
        task = bar.add_task("training sample models", total=total)
        yield lambda: bar.advance(task)


def _trained(directory: Path, todo: Sequence[Recipe], rows: Sequence[str], jobs: int) -> Iterator[Recipe]:
    """Trains models in worker processes, and yields each recipe when its model is done. Always ends the workers."""
    work: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    if rows:
        work.put({"rows": list(rows)})
    for made in todo:
        work.put(asdict(made))
    done: queue.SimpleQueue[Recipe | BuildError | None] = queue.SimpleQueue()
    jobs = max(1, min(jobs, -(-len(todo) // 8)))  # for a few models, starting a worker costs more than it saves
    workers = [
        subprocess.Popen(
            python("mesh.demo.fleet.worker", str(directory)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **_ONE_THREAD},
            start_new_session=True,  # the parent handles Ctrl-C
        )
        for _ in range(jobs)
    ]
    threads = [threading.Thread(target=_drive, args=(worker, work, done), daemon=True) for worker in workers]
    try:
        for thread in threads:
            thread.start()
        running = len(threads)
        while running:
            item = done.get()
            if item is None:
                running -= 1
            elif isinstance(item, BuildError):
                raise item
            else:
                yield item
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()


def _drive(
    worker: "subprocess.Popen[str]",
    work: "queue.SimpleQueue[dict[str, Any]]",
    done: "queue.SimpleQueue[Recipe | BuildError | None]",
) -> None:
    """Sends recipes to one worker until none is left."""
    assert worker.stdin is not None
    assert worker.stdout is not None
    assert worker.stderr is not None
    # Read continuously, or a worker with many warnings would block on a full pipe.
    said: list[str] = []
    errors = worker.stderr
    reader = threading.Thread(target=lambda: said.extend(errors), daemon=True)
    reader.start()
    try:
        while True:
            try:
                request = work.get_nowait()
            except queue.Empty:
                break
            what = request.get("id", "the data sets")
            line = _ask(worker.stdin, worker.stdout, json.dumps(request) + "\n")
            if not line:
                reader.join(1)
                raise BuildError(f"the process that made {what} ended: {''.join(said[-20:]).strip() or 'no output'}")
            answer = json.loads(line)
            if "error" in answer:
                raise BuildError(f"{what} could not be made: {answer['error']}")
            if "id" in request:
                done.put(Recipe(**request))
    except BuildError as error:
        done.put(error)
    except (OSError, ValueError) as error:
        done.put(BuildError(f"a training process failed: {error}"))
    finally:
        done.put(None)


def _ask(stdin: IO[str], stdout: IO[str], line: str) -> str:
    """Sends a line and returns the answer, or "" if the worker has ended."""
    try:
        stdin.write(line)
        stdin.flush()
    except BrokenPipeError:
        return ""
    return stdout.readline()
