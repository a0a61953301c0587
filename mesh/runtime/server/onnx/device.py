"""What models run on: the processor, or a CUDA device that was seen to work.

That onnxruntime lists a provider says only that its wheel was built with it: without a driver, or with another CUDA
than the wheel's, sessions fall back to the processor without a word. So a tiny session is really made and run before
anybody is told that there is a GPU; the pod's labels and the placement of models rest on it.

The bytes that a model takes on the device are the difference in the device's free memory, as CUDA itself tells it.
Other processes may use the same device, so this is the best that can be had, not exact as the host's bytes are.

What a session takes besides its weights is the CUDA libraries' own, and left to them it is 73 MiB for the smallest
model, and as much again for calls (H200, onnxruntime 1.31): cuBLAS alone keeps 32 MiB of workspace for each of its
handles there. With the least workspace, and one stream a session, it is 7 to 9 MiB and 6 more for each further call at
the same time, and calls take as long. CUDA keeps it when the session goes, for the next ones, which then seem to take
nothing: so each is counted with `SESSION_BYTES` at least. Weights are really given back.
"""

import ctypes
import glob
import os
import site
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import onnxruntime

from mesh.telemetry import logs
from placement.footprint import SESSION_BYTES

log = logs.get(__name__)

_CUDA = "CUDAExecutionProvider"
_CPU = "CPUExecutionProvider"
_WORKSPACE = ":16:8"  # eight pieces of 16 KiB, the least that cuBLAS offers

# y = x @ x for x of shape [2, 2].
_PROBE = bytes.fromhex(
    "080712003a400a110a01780a017812017922064d61744d756c1201675a130a0178120e0a0c080112080a0208020a0208"
    "0262130a0179120e0a0c080112080a0208020a02080242040a00100d"
)


class DeviceError(Exception):
    """The device that was asked for does not work. The text says what to do."""


@dataclass(frozen=True, slots=True)
class Device:
    """What sessions are made for."""

    name: Literal["cpu", "cuda"]
    providers: tuple[Any, ...]  # as onnxruntime.InferenceSession takes them

    def used(self) -> int:
        """Bytes in use on the device, by anybody; 0 where it has no memory of its own or nobody can tell."""
        used, _ = self.memory()
        return used

    @property
    def least(self) -> int:
        """Bytes that any session takes on it."""
        return SESSION_BYTES if self.memory()[1] else 0

    def memory(self) -> tuple[int, int]:
        """Bytes in use on the device, by anybody, and in all; zeros where it has none of its own or nobody can tell."""
        if self.name == "cpu" or _memory_info is None:
            return 0, 0
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        if _memory_info(ctypes.byref(free), ctypes.byref(total)):
            return 0, 0
        return total.value - free.value, total.value


CPU = Device("cpu", (_CPU,))
CUDA = Device(
    "cuda",
    (
        (
            _CUDA,
            {
                # Else the arena of each session doubles whenever it grows, on a device that thousands share.
                "arena_extend_strategy": "kSameAsRequested",
                # The default tries every algorithm on each new shape: seconds of a first call, and much workspace.
                "cudnn_conv_algo_search": "HEURISTIC",
                "cudnn_conv_use_max_workspace": "0",
                # Else products have a precision of 10 bits, and a model's answers depend on which pod gives them.
                "use_tf32": "0",
                "use_ep_level_unified_stream": "1",
            },
        ),
        _CPU,
    ),
)


def find(wanted: Literal["auto", "cpu", "cuda"]) -> Device:
    """The device to use, tried. Raises `DeviceError` where `cuda` is demanded and does not work."""
    problem = "" if wanted == "cpu" else _try_cuda()
    if wanted == "cpu" or (wanted == "auto" and problem):
        if problem and _CUDA in onnxruntime.get_available_providers():
            log.warning("no GPU is used", why=problem)
        _probe(CPU)
        return CPU
    if problem:
        raise DeviceError(f"--device cuda: {problem}; or use --device cpu")
    return CUDA


def _try_cuda() -> str:
    """Why CUDA does not work; empty where it does."""
    if _CUDA not in onnxruntime.get_available_providers():
        return "this onnxruntime is built without CUDA: install the extra `gpu` instead of `cpu`"
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", _WORKSPACE)  # read by cuBLAS when a session makes its handle
    try:
        if hasattr(onnxruntime, "preload_dlls"):
            onnxruntime.preload_dlls()
        if _probe(CUDA) != _CUDA:
            return (
                "onnxruntime has CUDA but cannot use it: check that `nvidia-smi` works in this container "
                "and that the CUDA and cuDNN libraries are those that its release notes name"
            )
    except Exception as error:
        return f"onnxruntime has CUDA but a first session failed: {str(error)[:500]}"
    _find_memory_info()
    return ""


def _probe(device: Device) -> str:
    """Runs a tiny model and gives the provider that it ran on. Also takes from later loads what the first one costs."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.enable_cpu_mem_arena = False
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(_PROBE, options, providers=list(device.providers), enable_fallback=0)
    square = session.run(None, {"x": np.array([[1, 2], [3, 4]], np.float32)})[0]
    if square.tolist() != [[7, 10], [15, 22]]:
        raise DeviceError(f"{device.name} multiplies wrongly: {square.tolist()}")
    return str(session.get_providers()[0])


_memory_info: Any = None


def _find_memory_info() -> None:
    """Finds `cudaMemGetInfo` in the CUDA runtime that is loaded already, or beside it in the nvidia wheels."""
    global _memory_info
    places = [path for folder in site.getsitepackages() for path in glob.glob(f"{folder}/nvidia/*/lib/libcudart.so.*")]
    for name in (*sorted(places, reverse=True), "libcudart.so.13", "libcudart.so.12", "libcudart.so"):
        try:
            _memory_info = ctypes.CDLL(name, mode=os.RTLD_LOCAL | os.RTLD_LAZY).cudaMemGetInfo
        except (OSError, AttributeError):
            continue
        return
    log.warning("device memory of models is not measured", why="no libcudart was found")
