"""The ONNX project's node tests, run through a mesh of real processes by `make test-onnx`. They take minutes, so `make
test` leaves them out."""
