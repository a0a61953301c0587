"""`python -m mesh`: the `mesh` command, also where its script is not on PATH."""

import sys

from mesh.cli import main

if __name__ == "__main__":
    sys.exit(main())
