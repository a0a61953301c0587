"""Third-party clients and proxies, as real programs, at a mesh's doors.

Those of Debian's packages (nginx, ab, curl, wget) and those in Python run wherever they are found. Those that must be
compiled or fetched first (`programs/`: Java, Go, Node) are made by `make test-clients`.
"""
