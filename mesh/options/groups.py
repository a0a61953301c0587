"""Groups of options: dataclasses whose fields are options, taken by a command as one parameter.

Typer has no groups, so commands that share eight options would repeat eight parameters. `expanded` replaces a parameter
whose type is such a dataclass with the dataclass's fields, in their order. The command receives the dataclass.
"""

import dataclasses
import functools
import inspect
import typing
from collections.abc import Callable
from typing import Any


def expanded(command: Callable[..., None]) -> Callable[..., None]:
    """Returns the command with the fields of its groups as parameters. Raises TypeError if a name occurs twice."""
    groups: dict[str, Any] = {}
    parameters: dict[str, inspect.Parameter] = {}
    for parameter in inspect.signature(command, eval_str=True).parameters.values():
        group = parameter.annotation
        if dataclasses.is_dataclass(group):
            groups[parameter.name] = group
        for found in _fields(group) if dataclasses.is_dataclass(group) else [parameter]:
            if found.name in parameters:
                raise TypeError(f"{command.__qualname__} has the option {found.name} twice")
            parameters[found.name] = found.replace(kind=inspect.Parameter.KEYWORD_ONLY)

    @functools.wraps(command)
    def taken_apart(**values: Any) -> None:
        for name, group in groups.items():
            values[name] = group(**{field.name: values.pop(field.name) for field in dataclasses.fields(group)})
        command(**values)

    taken_apart.__dict__["__signature__"] = inspect.Signature(list(parameters.values()))
    taken_apart.__annotations__ = {name: parameter.annotation for name, parameter in parameters.items()}
    return taken_apart


def _fields(group: Any) -> list[inspect.Parameter]:
    hints = typing.get_type_hints(group, include_extras=True)
    return [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if field.default is dataclasses.MISSING else field.default,
            annotation=hints[field.name],
        )
        for field in dataclasses.fields(group)
    ]
