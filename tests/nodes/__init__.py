"""The ONNX project's node tests, through a mesh of real processes: `make test-onnx`. They take minutes, so `make test`
leaves them out."""
