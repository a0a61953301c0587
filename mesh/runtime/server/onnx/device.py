"""The device on which models run: the processor, or a CUDA device that was tested.

A provider in ONNX Runtime's list only means that the wheel was built with it. Without a driver, or with a CUDA version
other than the wheel's, sessions silently fall back to the processor. A tiny session is therefore made and run before
the server reports a GPU, because the pod's labels and the placement of models depend on this report.

A model's bytes on the device are the difference in the device's free memory, as CUDA reports it. Other processes may
use the same device, so the figure is less exact than the one for the host.

Besides its weights, a session takes memory for the CUDA libraries. By default, that is 73 MiB for the smallest model,
and as much again for calls (H200, onnxruntime 1.31); of this, cuBLAS alone keeps 32 MiB of workspace for each of its
handles. With the smallest workspace and one stream per session, a session takes 7 to 9 MiB, plus 6 MiB for each further
simultaneous call, and calls take no longer. When a session ends, CUDA keeps this memory for later sessions, which then
seem to take nothing. Each session therefore counts as at least `SESSION_BYTES`. Weights are really freed.
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
_WORKSPACE = ":16:8"  # eight pieces of 16 KiB, the minimum of cuBLAS

# y = x @ x for x of shape [2, 2].
_PROBE = bytes.fromhex(
    "080712003a400a110a01780a017812017922064d61744d756c1201675a130a0178120e0a0c080112080a0208020a0208"
    "0262130a0179120e0a0c080112080a0208020a02080242040a00100d"
)


class DeviceError(Exception):
    """A device that was requested and does not work. The text says why."""


@dataclass(frozen=True, slots=True)
class Device:
    """The device on which sessions run."""

    name: Literal["cpu", "cuda"]
    providers: tuple[Any, ...]  # as onnxruntime.InferenceSession takes them

    def used(self) -> int:
        """Returns the bytes in use on the device, by all processes. Returns 0 if the device has no memory of its own,
        or if the number is unknown."""
        used, _ = self.memory()
        return used

    @property
    def least(self) -> int:
        """The smallest number of bytes that a session takes on the device; 0 if the device has no memory of its own, or
        if its memory is unknown."""
        return SESSION_BYTES if self.memory()[1] else 0

    def memory(self) -> tuple[int, int]:
        """Returns the bytes in use on the device, by all processes, and the device's total bytes. Returns zeros if the
        device has no memory of its own, or if the numbers are unknown."""
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
                # By default the arena of each session doubles when it grows, but thousands of sessions share the
                # device.
                "arena_extend_strategy": "kSameAsRequested",
                # By default every algorithm is tried on each new shape: seconds of a first call, and much workspace.
                "cudnn_conv_algo_search": "HEURISTIC",
                "cudnn_conv_use_max_workspace": "0",
                # With TF32, products have a precision of 10 bits, and a model's answers depend on the pod.
                "use_tf32": "0",
                "use_ep_level_unified_stream": "1",
            },
        ),
        _CPU,
    ),
)


def find(wanted: Literal["auto", "cpu", "cuda"]) -> Device:
    """Tests the wanted device and returns it. With `auto`, returns CUDA if it works, and the CPU otherwise. Raises
    `DeviceError` if `cuda` is wanted and does not work, or if the CPU fails the test."""
    problem = "" if wanted == "cpu" else _try_cuda()
    if wanted == "cpu" or (wanted == "auto" and problem):
        if problem and _CUDA in onnxruntime.get_available_providers():
            log.warning("models run on the CPU, because the GPU cannot be used", why=problem)
        _probe(CPU)
        return CPU
    if problem:
        raise DeviceError(f"--device cuda does not work: {problem}; or use --device cpu")
    return CUDA


def _try_cuda() -> str:
    """Returns the reason why CUDA does not work, or "" if it does."""
    if _CUDA not in onnxruntime.get_available_providers():
        return "the installed onnxruntime has no CUDA: install mesh-serving with the extra `gpu` instead of `cpu`"
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", _WORKSPACE)  # read by cuBLAS when a session makes its handle
    try:
        if hasattr(onnxruntime, "preload_dlls"):
            onnxruntime.preload_dlls()
        if _probe(CUDA) != _CUDA:
            return (
                "onnxruntime has CUDA but cannot use it: check that `nvidia-smi` works in this container "
                "and that the CUDA and cuDNN versions are those in onnxruntime's release notes"
            )
    except Exception as error:
        return f"onnxruntime has CUDA, but a trial session failed: {str(error)[:500]}"
    _find_memory_info()
    return ""


def _probe(device: Device) -> str:
    """Runs a tiny model, and returns the provider that ran it. Later loads then do not bear the cost of the process's
    first session."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.enable_cpu_mem_arena = False
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(_PROBE, options, providers=list(device.providers), enable_fallback=0)
    square = session.run(None, {"x": np.array([[1, 2], [3, 4]], np.float32)})[0]
    if square.tolist() != [[7, 10], [15, 22]]:
        raise DeviceError(
            f"the device {device.name} is faulty: a trial product is {square.tolist()} instead of [[7, 10], [15, 22]]"
        )
    return str(session.get_providers()[0])


_memory_info: Any = None


def _find_memory_info() -> None:
    """Finds `cudaMemGetInfo` in the CUDA runtime that is already loaded, or in the nvidia wheels."""
    global _memory_info
    places = [path for folder in site.getsitepackages() for path in glob.glob(f"{folder}/nvidia/*/lib/libcudart.so.*")]
    for name in (*sorted(places, reverse=True), "libcudart.so.13", "libcudart.so.12", "libcudart.so"):
        try:
            _memory_info = ctypes.CDLL(name, mode=os.RTLD_LOCAL | os.RTLD_LAZY).cudaMemGetInfo
        except (OSError, AttributeError):
            continue
        return
    log.warning("the device memory of models is not measured", why="libcudart was not found")
