"""Models in onnxruntime: from a file to a session, its memory and its device."""
