"""The ONNX project's node tests, through a mesh of real processes: `make test-onnx`. Minutes, so not in `make test`."""
