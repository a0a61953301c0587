"""The container image: its Containerfile, and what builds it."""
