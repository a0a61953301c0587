"""Conversion of models of Python libraries to ONNX, for `mesh convert`.

The command keeps a conversion only if the converted model gives the library's own answers, within a tolerance.

- `loading` reads a model's file, which runs its code if it is a pickle;
- `layout` finds out what the model's rows look like: their columns, and the types of these;
- `making` makes the ONNX model;
- `samples` makes rows up from what the model knows, and `given` reads rows from a file;
- `comparing` compares the answers of both models.

The libraries belong to the extra `convert`. Modules import them when they are needed, so that `mesh` starts without.
"""
