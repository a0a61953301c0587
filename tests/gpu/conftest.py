"""The requirement of the GPU tests (`make test-gpu`): an NVIDIA GPU that runs models. It is checked before any test."""

import functools
import subprocess
import sys
from collections.abc import Iterator

import pytest


class Nvml:
    """The device's memory in use by all processes, as the driver counts it."""

    def __init__(self) -> None:
        import pynvml  # only where there is a driver

        self._nvml = pynvml
        pynvml.nvmlInit()
        self._device = pynvml.nvmlDeviceGetHandleByIndex(0)
        self.name = str(pynvml.nvmlDeviceGetName(self._device))

    def used(self) -> int:
        """Returns the memory in use, in bytes."""
        return int(self._nvml.nvmlDeviceGetMemoryInfo(self._device).used)

    def close(self) -> None:
        """Closes the connection to the driver."""
        self._nvml.nvmlShutdown()


@functools.cache
def why_not() -> str:
    """Returns why there is no usable GPU, or an empty text if there is one."""
    try:
        Nvml().close()
    except Exception as error:  # the library, the driver or the device is missing, each with an error of its own
        return f"NVML finds no NVIDIA GPU: {error}"
    code = "from mesh.runtime.server.onnx import device; device.find('cuda')"
    tried = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=False)
    return tried.stderr.strip().splitlines()[-1] if tried.returncode else ""


@pytest.fixture(scope="session")
def nvml() -> Iterator[Nvml]:
    """The driver's view of the GPU. Without a GPU, tests are skipped with a warning."""
    if why := why_not():
        pytest.skip(f"NO TEST HAS RUN ON A GPU: {why} (make test-gpu)")
    made = Nvml()
    yield made
    made.close()
