"""Models as onnxruntime holds them: from a file to a session, what it takes of memory, and on which device."""
