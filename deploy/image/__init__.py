"""The container image: its Containerfile, and the code that builds it."""
