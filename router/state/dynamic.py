"""Settings that change while the mesh runs: the keys below `config/` in etcd, which the feed delivers.

Each setting is a string that `placement` parses, and that is checked before it is written (`router.management.tuning`).
If another program has written a string that cannot be parsed, this is logged, and the old value still applies.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

from mesh.schema.keys import Keys
from mesh.telemetry import logs
from placement import constraints, limits
from placement.constraints import NONE, Constraints
from placement.limits import TypeLimits
from router.state.feed.ranges import Item

log = logs.get(__name__)

TYPE_CONSTRAINTS = "type_constraints"
TYPE_LIMITS = "type_limits"


@dataclass(frozen=True, slots=True)
class Current:
    """The parsed settings that the router applies now."""

    constraints: Constraints = NONE
    limits: TypeLimits = TypeLimits()  # noqa: RUF009 - frozen


_SETTERS: Mapping[str, Callable[[Current, str], Current]] = {
    TYPE_CONSTRAINTS: lambda current, text: replace(current, constraints=constraints.parse(text)),
    TYPE_LIMITS: lambda current, text: replace(current, limits=limits.parse(text)),
}

NAMES = tuple(_SETTERS)


def parse(name: str, text: str) -> Current:
    """Parses one setting and returns `Current` with only that setting. Raises ValueError if the text cannot be
    parsed."""
    return _SETTERS[name](Current(), text)


class Dynamic:
    """The settings. `current` is replaced as a whole when a setting changes."""

    def __init__(self, keys: Keys) -> None:
        self._keys = keys
        self._texts: dict[str, str] = {}
        self.current = Current()

    def snapshot(self, _: int, items: Iterable[Item]) -> None:
        """Adopts all settings. A setting that is missing from `items` is no longer set."""
        values = {self._keys.setting_of(key): value for key, value in items}
        for name in NAMES:
            self._take(name, values.get(name))

    def delta(self, _: int, items: Iterable[Item]) -> None:
        """Adopts changed settings. A setting without a value is no longer set."""
        for key, value in items:
            self._take(self._keys.setting_of(key), value)

    def _take(self, name: str, value: bytes | None) -> None:
        text = (value or b"").decode(errors="replace")
        setter = _SETTERS.get(name)
        if setter is None or text == self._texts.get(name, ""):
            return
        try:
            self.current = setter(self.current, text)
        except ValueError as error:
            log.error("a setting in etcd cannot be read; the previous value stays in use", name=name, why=str(error))
            return
        self._texts[name] = text
        log.info("setting changed", name=name)
