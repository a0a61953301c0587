"""`python -m mesh`: the `mesh` command where installed scripts are not on PATH."""

import sys

from mesh.cli import main

if __name__ == "__main__":
    sys.exit(main())
