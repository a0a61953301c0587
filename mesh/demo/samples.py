"""The sample models that `mesh up` registers: the first models of the demo's fleet, kept in the data directory.

A separate process, which runs this module, makes the models. Training blocks for seconds, and must stop at once when
`mesh up` ends.
"""

import sys
from pathlib import Path

from mesh import process
from mesh.demo.fleet import BuildError, Fleet, Sample, build

COUNT = 6
SECONDS = 180.0
"""Time limit for making the samples, in seconds; on a free core it takes five."""


class NoSamples(Exception):
    """The reason why the samples cannot be made."""


async def prepare(folder: Path) -> tuple[Sample, ...]:
    """Returns the sample models in `folder`. A child process makes those that are missing. Raises NoSamples."""
    argv = process.python("mesh.demo.samples", str(folder))
    child = await process.spawn(argv, name="samples")
    try:
        returncode = await child.wait(SECONDS)
        if returncode != 0:
            raise NoSamples(child.tail[-1] if child.tail else process.describe_exit(returncode))
        return Fleet.load(folder).models
    except (TimeoutError, ValueError) as error:
        raise NoSamples(str(error)) from error
    finally:
        child.kill()


if __name__ == "__main__":
    try:
        build(Path(sys.argv[1]), COUNT)
    except (BuildError, OSError) as error:
        sys.exit(str(error))
