"""The demo: several hundred real models on pods with memory for a tenth of them. Every answer is verified.

    report = await run_demo(endpoint, fleet, seconds=30)

`calls` speaks V2 as clients do, over gRPC and REST; `traffic` sends skewed requests and compares every answer with
onnxruntime's; `numbers` reads the mesh's counters and the memory of its processes; `report` prints the table at the
end. `python -m mesh.demo` (which `mesh demo` runs) builds the fleet, and starts a mesh for it unless the endpoint of a
running mesh is given.
"""

from mesh.demo.report import Report
from mesh.demo.run import DemoError, run_demo

__all__ = ["DemoError", "Report", "run_demo"]
