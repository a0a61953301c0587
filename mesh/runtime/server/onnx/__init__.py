"""ONNX models in ONNX Runtime: loading a file into a session, measuring its memory, choosing its device."""
