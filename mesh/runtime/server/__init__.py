"""The ONNX model server: a process that holds models in memory and answers V2 inference for them.

It is a separate process because models are in effect other people's code: a model that crashes its server or takes all
memory must not take down the agent, which decides what is in this pod's memory. Like any model server, it is driven
over the SPI.

From the outside in:

- `process` assembles the parts, `settings` parses the command line, `spi` serves the agent's calls;
- `loads/` loads and unloads copies: `loader`, and `trimmer`, which returns memory to the system;
- `calls/` answers calls for the copies in `copies`: `dataport` runs short calls in the event loop (chosen by `pace`,
  supervised by `watch`), `runs` takes long ones, on the threads of `workers`;
- `onnx/` deals with onnxruntime: `making` (a session and its size), `onnxfile` (which file to load, and what it may
  read, by `outline`), `functions` (how many operators they expand to), `session`, `device` (CPU or CUDA), `memory`
  (bytes and limits), `optimiser` (a separate program);
- `v2/` converts between V2 and numpy: `requests` (decoding, and in which thread), `intake` and `reply`, `tensors`,
  `values`, `contents`, `alignment`, `shortcuts`.

The agent makes a `mesh.runtime.sharedmemory.board.Board`, starts the process with the board's path, calls
`runtimeStatus`, then `loadModel` and `unloadModel` with the metadata that `spi` describes. It reads uses, suspects and
the histogram of calls (`modelmesh_invoke_model_milliseconds`, by `Board.calls()`) from the board, and resident memory
from /proc.
"""
