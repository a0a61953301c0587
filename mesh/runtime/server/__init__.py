"""The ONNX model server: a process that holds models in memory and answers V2 inference for them.

A process of its own because models are other people's code in all but name: one that crashes it, or takes all memory,
must not take the agent along, which decides what is in this pod's memory. It is driven over the SPI, as any model
server is.

From the outside in:

- `process` puts the parts together, `settings` is its command line, `spi` is what the agent calls;
- `loads/` bring copies in and out: `loader`, and `trimmer`, which gives memory back;
- `calls/` are answered for what `copies` holds: `dataport`, short ones in the event loop, as `pace` knows and `watch`
  sees to, long ones in `runs` on the threads of `workers`; `answers`;
- `onnx/` is models as onnxruntime holds them: `making` (a session and its size), `onnxfile` (which file, and what it
  may read, by `outline`), `functions` (how much they unfold to), `session`, `device` (CPU or CUDA), `memory` (bytes and
  limits), `optimiser` (a program of its own);
- `v2/` is V2 and numpy: `requests` (bytes, and what of them is read where), `intake` and `reply`, `tensors`, `values`,
  `contents`, `alignment`, `shortcuts`.

How the agent uses it: make a `mesh.runtime.sharedmemory.board.Board`, start the process with its path, ask
`runtimeStatus`, then `loadModel` and `unloadModel` with the metadata that `spi` describes. Read uses, suspects and the
histogram of calls (`modelmesh_invoke_model_milliseconds`, by `Board.calls()`) from the board, resident memory from
/proc.
"""
