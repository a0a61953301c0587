"""The few sample models that `mesh up` registers: the first of the demo's fleet, kept in the data directory.

They are made by a process of their own (this module, run as a program), because making them blocks for seconds and must
end at once where `mesh up` ends.
"""

import sys
from pathlib import Path

from mesh import process
from mesh.demo.fleet import BuildError, Fleet, Sample, build

COUNT = 6
SECONDS = 180.0
"""For making them: five seconds where a core is free."""


class NoSamples(Exception):
    """They cannot be made; the text says why."""


async def prepare(folder: Path) -> tuple[Sample, ...]:
    """Makes sure that the models are in `folder`. Raises NoSamples."""
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
