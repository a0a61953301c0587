"""What the doctor says: one finding a line, with what to do where something is wrong."""

import enum
from dataclasses import dataclass


class Level(enum.Enum):
    """How bad it is."""

    OK = "ok"
    WARN = "warn"
    """Works, and somebody should look at it; or one model of many does not."""
    FAIL = "FAIL"
    """Does not work, or soon will not."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was checked. `area` and `check` name it to programs, `what` and `todo` tell people."""

    level: Level
    area: str
    check: str
    what: str
    todo: str = ""

    def document(self) -> dict[str, str]:
        """For --json."""
        return {
            "level": self.level.value.lower(),
            "area": self.area,
            "check": self.check,
            "what": self.what,
            "todo": self.todo,
        }


@dataclass(frozen=True, slots=True)
class Area:
    """Makes the findings of one area."""

    name: str

    def ok(self, check: str, what: str) -> Finding:
        """All is well."""
        return Finding(Level.OK, self.name, check, what)

    def warn(self, check: str, what: str, todo: str = "") -> Finding:
        """See `Level.WARN`."""
        return Finding(Level.WARN, self.name, check, what, todo)

    def fail(self, check: str, what: str, todo: str = "") -> Finding:
        """See `Level.FAIL`."""
        return Finding(Level.FAIL, self.name, check, what, todo)


def some(names: list[str], most: int = 5) -> str:
    """The first of several names, and how many more there are."""
    text = ", ".join(names[:most])
    return text if len(names) <= most else f"{text} and {len(names) - most} more"
