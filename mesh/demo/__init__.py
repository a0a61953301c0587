"""The demo: several hundred real models on pods with room for a tenth of them, and every answer verified.

    report = await run_demo(endpoint, fleet, seconds=30)

`calls` speaks V2 as clients do, over gRPC and REST; `traffic` sends skewed requests and compares every answer with
onnxruntime's; `numbers` asks the mesh what it did and the kernel what it takes; `report` is the table at the end.
`python -m mesh.demo` (what `mesh demo` becomes) builds the fleet and starts a mesh for it, unless told of one.
"""

from mesh.demo.report import Report
from mesh.demo.run import DemoError, run_demo

__all__ = ["DemoError", "Report", "run_demo"]
