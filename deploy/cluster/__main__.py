"""`python -m deploy.cluster`: the entry point of `lifecycle`."""

import sys

from deploy.cluster import lifecycle

sys.exit(lifecycle.main(sys.argv[1:]))
