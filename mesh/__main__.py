"""`python -m mesh`: the `mesh` command for environments whose scripts are not on PATH."""

import sys

from mesh.cli import main

if __name__ == "__main__":
    sys.exit(main())
