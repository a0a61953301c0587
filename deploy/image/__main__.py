"""`python -m deploy.image`, which `make image` runs: builds the image with an available engine.

Parameters are environment variables, which `make image NAME=value` sets: TAG, ENGINE, and the build arguments of
`Containerfile`.
"""

import os
import subprocess
import sys

from deploy.image import building


def main() -> int:
    """Builds the image and prints its name. Returns the exit status."""
    try:
        engine = building.engine(os.environ.get("ENGINE", ""))
    except building.NoEngineError as error:
        print(error, file=sys.stderr)
        return 1
    tag = os.environ.get("TAG") or building.default_tag(os.environ.get("LOCK", ""))
    argv = building.command(
        engine,
        tag=tag,
        arguments=building.arguments(os.environ),
        secrets=building.secrets(os.environ),
    )
    print(f"building {tag} with {engine}", flush=True)
    done = subprocess.run(argv, cwd=building.ROOT, env=building.environment(os.environ))
    if done.returncode == 0:
        print(f"the image is {tag}")
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
