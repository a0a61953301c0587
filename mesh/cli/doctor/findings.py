"""Findings of the doctor. A finding that something is wrong says what to do."""

import enum
from dataclasses import dataclass


class Level(enum.Enum):
    """The severity of a finding."""

    OK = "ok"
    WARN = "warn"
    """Something that works but needs attention, or one model of many that does not work."""
    FAIL = "FAIL"
    """Something that does not work, or will soon stop working."""


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of one check. `area` and `check` are for programs, `what` and `todo` for people."""

    level: Level
    area: str
    check: str
    what: str
    todo: str = ""

    def document(self) -> dict[str, str]:
        """Returns the document that --json prints."""
        return {
            "level": self.level.value.lower(),
            "area": self.area,
            "check": self.check,
            "what": self.what,
            "todo": self.todo,
        }


@dataclass(frozen=True, slots=True)
class Area:
    """An area of checks, with methods that make its findings."""

    name: str

    def ok(self, check: str, what: str) -> Finding:
        """Returns a finding of level OK."""
        return Finding(Level.OK, self.name, check, what)

    def warn(self, check: str, what: str, todo: str = "") -> Finding:
        """Returns a finding of level WARN."""
        return Finding(Level.WARN, self.name, check, what, todo)

    def fail(self, check: str, what: str, todo: str = "") -> Finding:
        """Returns a finding of level FAIL."""
        return Finding(Level.FAIL, self.name, check, what, todo)


def some(names: list[str], most: int = 5) -> str:
    """Lists the first `most` names, and says how many more follow."""
    text = ", ".join(names[:most])
    return text if len(names) <= most else f"{text} and {len(names) - most} more"
