"""Ownership of tasks: no task runs or dies unnoticed.

Long-lived tasks are duties (`mesh.process.tasks`). Other functions that may start a task are listed here, each with a
note about the task's end. Task groups, and functions that cancel their tasks in a `finally`, need not be listed.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

ALLOWED = {
    "tasks:Tasks.start": "held there, its failure logged",
    "tasks:Tasks.run": "held there",
    "ending:Ending.close": "awaited, within a bound",
    "watcher:Watch.__init__": "its failure is the supervisor's (Watch.failed)",
    "watcher:Answers.__init__": "catches everything; without it the program counts as hung",
    "connection:Connection.switch": "ends after a grace",
    "lease:Lease.__init__": "its failure loses the lease, which its holder hears of",
    "stream:Stream._run": "awaited",
    "__main__:_until": "awaited",
    "loading:Loading.run": "the pull of one load, which awaits it",
    "loading:_to_its_end": "awaited",
    "rooms:Rooms._made": "ends when no load waits; those that do have a time-out",
    "fence:Fence.look": "one question to etcd, with a time-out",
    "dataport:DataPort.handle": "reads one request",
    "loader:Loader.load": "one load, awaited by its caller",
    "loader:Loader.unload": "one unloading, awaited by its caller",
    "client:Pool._begin": "makes one connection, with a time-out",
    "directegress:DirectEgress._connect": "makes one connection, its failure logged",
    "grpcegress:GrpcCall.end": "ends with its call",
    "grpc:GrpcCall.start": "awaited before the first message",
    "tombstones:Tombstones.open_lives": "one read, awaited by its caller",
    "agents:Agents._retire": "closes one channel, with a time-out",
    "agents:Agents.forget": "closes one channel",
    "bulk:Bulk._submit": "one batch, awaited by the request that it belongs to",
    "calls:RelayPort._carry_on": "one call, held by its copy until it ends",
    "folders:Folders.fill": "awaited by its load, also if that is cancelled",
    "ovmsconfig:Reloads._changed": "one change, whose callers get its error",
    "conversions:Conversions._convert": "one conversion, awaited by its call",
}

STARTS = ("create_task", "ensure_future")


def started(module: str, tree: ast.AST) -> Iterator[str]:
    """Yields the functions that start a task directly, as MODULE:FUNCTION."""
    groups = {
        item.optional_vars.id
        for node in ast.walk(tree)
        if isinstance(node, ast.AsyncWith)
        for item in node.items
        if isinstance(item.context_expr, ast.Call)
        and _name(item.context_expr.func) == "TaskGroup"
        and isinstance(item.optional_vars, ast.Name)
    }

    def bare(function: ast.expr) -> bool:
        owner = function.value if isinstance(function, ast.Attribute) else None
        return _name(function) in STARTS and not (isinstance(owner, ast.Name) and owner.id in groups)

    def walk(node: ast.AST, names: tuple[str, ...], tidy: bool) -> Iterator[str]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef):
                yield from walk(child, (*names, child.name), False)
            elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                yield from walk(child, (*names, child.name), _ends_its_own(child))
            else:
                if isinstance(child, ast.Call) and not tidy and bare(child.func):
                    yield f"{module}:{'.'.join(names)}"
                yield from walk(child, names, tidy)

    yield from walk(tree, (), False)


def _name(function: ast.expr) -> str:
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def _ends_its_own(function: ast.AST) -> bool:
    """Returns whether the function cancels something in a `finally`."""
    return any(
        isinstance(call, ast.Call) and _name(call.func) == "cancel"
        for node in ast.walk(function)
        if isinstance(node, ast.Try)
        for statement in node.finalbody
        for call in ast.walk(statement)
    )


def test_no_task_is_started_that_nobody_holds() -> None:
    found = set()
    for package in ("mesh", "router"):
        for path in sorted((ROOT / package).rglob("*.py")):
            text = path.read_text()
            if any(start in text for start in STARTS):
                found |= set(started(path.stem, ast.parse(text)))
    assert found - ALLOWED.keys() == set(), (
        "make the task a duty, use `Tasks.start`, or add a row above that says what becomes of the task"
    )
    assert ALLOWED.keys() - found == set(), "these functions start no tasks any more: remove their rows"


def test_the_check_can_tell() -> None:
    text = """
async def bare():
    asyncio.create_task(work())
class A:
    def b(self):
        self.task = loop.create_task(work())
async def grouped():
    async with asyncio.TaskGroup() as group:
        group.create_task(work())
async def tidy():
    task = asyncio.ensure_future(work())
    try:
        await other()
    finally:
        task.cancel()
"""
    assert set(started("m", ast.parse(text))) == {"m:bare", "m:A.b"}
