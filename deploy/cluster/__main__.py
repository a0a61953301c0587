"""`python -m deploy.cluster`: see `lifecycle`."""

import sys

from deploy.cluster import lifecycle

sys.exit(lifecycle.main(sys.argv[1:]))
