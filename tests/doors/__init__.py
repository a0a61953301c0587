"""Tests with third-party clients and proxies, run as real programs against a mesh.

Programs from Debian packages (nginx, ab, curl, wget) and Python clients are tested if they are installed. `make
test-clients` makes those that must be compiled or fetched first (`programs/`: Java, Go, Node).
"""
