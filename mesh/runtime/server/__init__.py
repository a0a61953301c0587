"""The ONNX model server: a process that holds models in memory and answers V2 inference for them.

The server is a separate process because models are in effect other people's code: a model that crashes its server or
uses up its memory must not end the agent. Like every model server, it is controlled over the SPI.

From the outside in:

- `process` assembles the parts, `settings` parses the command line, `spi` serves the agent's calls;
- `loads/` loads and unloads copies: `loader`, and `trimmer`, which returns memory to the system;
- `calls/` answers calls for the copies in `copies`: `dataport` runs short calls in the event loop (chosen by `pace`,
  supervised by `watch`), and `runs` runs long calls in the threads of `workers`;
- `onnx/` deals with onnxruntime: `making` (a session and its size), `onnxfile` (the choice and the check of a model's
  file, by `outline`), `functions` (the number of operators to which functions expand), `session`, `device` (CPU or
  CUDA), `memory` (bytes and limits), `optimiser` (a separate program);
- `v2/` converts between V2 and numpy: `requests` (decoding, in the loop or in a thread), `intake` and `reply`,
  `tensors`, `values`, `contents`, `alignment`, `shortcuts`.

The agent makes a `mesh.runtime.sharedmemory.board.Board`, starts the process with the board's path, calls
`runtimeStatus`, then `loadModel` and `unloadModel` with the metadata that `spi` describes. It reads uses, suspects and
the histogram of calls (`modelmesh_invoke_model_milliseconds`, by `Board.calls()`) from the board, and resident memory
from /proc.
"""
