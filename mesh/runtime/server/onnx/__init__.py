"""ONNX models in onnxruntime: loading a file into a session, measuring its memory, choosing its device."""
