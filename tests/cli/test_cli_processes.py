"""Commands that start processes: the options that they pass on, and those that they refuse."""

import asyncio
import re
import subprocess
import sys
import types

import pytest
import typer
from typer.testing import CliRunner

import mesh.runtime.__main__ as runtime_main
import router.__main__ as router_main
from mesh import cli
from mesh.cli import options, processes
from mesh.cli.app import build
from mesh.cli.exits import Exit
from mesh.local import parts
from mesh.local.settings import UpError

COMMANDS = ["up", "router", "runtime", "register", "import", "unregister", "ls", "status", "load", "infer", "pods"]
COMMANDS += ["top", "explain", "release", "demo", "version", "doctor", "backup", "restore", "snapshot"]
COMMANDS += ["reload"]


def test_every_command_is_there_and_explains_itself():
    """The help lists all of COMMANDS, and the help of each has an example, except for router, runtime, demo and
    version."""
    text = CliRunner().invoke(build(), ["--help"]).output
    assert [name for name in COMMANDS if name not in text] == []
    assert "Exit codes" in text
    for name in set(COMMANDS) - {"router", "runtime", "demo", "version"}:
        result = CliRunner().invoke(build(), [name, "--help"])
        assert result.exit_code == 0
        assert "Example" in result.output, name


def test_usage_lines_have_each_bracket_once():
    """typer adds brackets and dots to the names of arguments, so these names must not have them too."""

    def usages(command, name, parent=None):
        context = typer.Context(command, info_name=name, parent=parent)
        yield command.get_usage(context)
        for word, below in getattr(command, "commands", {}).items():
            yield from usages(below, word, context)

    found = list(usages(typer.main.get_command(build()), "mesh"))
    assert len(found) > len(COMMANDS)
    assert [usage for usage in found if re.search(r"\[\[|\{\[|\.\.\.[\]}]", usage)] == []


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, asyncio.CancelledError])
def test_an_interrupted_command_ends_with_130(interrupt):
    """An interrupted command exits with 130, whether asyncio reports the interrupt as KeyboardInterrupt or as a
    cancellation."""

    def command():
        raise interrupt

    with pytest.raises(typer.Exit) as ended:
        options.guarded(command)
    assert ended.value.exit_code == Exit.INTERRUPTED


def test_an_interrupt_while_modules_are_imported_is_no_traceback(monkeypatch):
    module = types.ModuleType("mesh.cli.app")

    def run():
        raise KeyboardInterrupt

    module.run = run
    monkeypatch.setitem(sys.modules, "mesh.cli.app", module)
    assert cli.main() == Exit.INTERRUPTED


@pytest.mark.parametrize("program", ["router", "runtime", "up"])
def test_the_help_of_each_address_names_its_form(program):
    """The test recognises an option that takes an address by its default value or by its help."""
    apps = {"router": router_main.app, "runtime": runtime_main.app}
    command = typer.main.get_command(apps[program]) if program in apps else typer.main.get_command(build())
    command = command.commands[program] if program == "up" else command
    addresses = [
        option
        for option in command.params
        if re.fullmatch(r"[\w.]+:\d+", str(option.default)) or str(option.help).startswith("Address")
    ]
    assert len(addresses) >= 3
    assert [one.name for one in addresses if "HOST:PORT" not in f"{one.metavar} {one.help}"] == []


def test_help_waits_for_nothing_that_is_slow_to_import():
    """The command line can be built without the modules that are slow to import."""
    slow = "grpc", "aiohttp", "cryptography", "numpy"
    code = f"import sys, mesh.cli.app as app; app.build(); print([name for name in {slow} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("command", "module"), [("router", "router"), ("runtime", "mesh.runtime"), ("demo", "mesh.demo")]
)
def test_other_programs_get_their_arguments_as_they_are(monkeypatch, command, module):
    """Arguments of another program reach it unchanged, even --help and unknown options, because this process becomes
    that program."""
    became = []
    monkeypatch.setattr(processes.os, "execv", lambda path, argv: became.append((path, argv)))
    arguments = ["--help", "--listen", "127.0.0.1:1", "--unknown=x", "-h"]
    assert CliRunner().invoke(build(), [command, *arguments]).exit_code == 0
    assert became == [(sys.executable, [sys.executable, "-P", "-m", module, *arguments])]


def test_an_installation_without_the_demo_says_so(monkeypatch):
    """If the demo is not installed, as in the container image, `mesh demo` says so."""
    monkeypatch.setattr(processes.importlib.util, "find_spec", lambda name: None)
    result = CliRunner().invoke(build(), ["demo"])
    assert result.exit_code == 1
    assert "this installation does not include" in result.output


@pytest.fixture
def up(monkeypatch):
    """Returns a function that runs `mesh up` without starting a mesh. The function returns the command's result, and
    the settings of all starts so far."""
    started = []

    def fake(settings, **how):
        started.append((settings, how))

    monkeypatch.setattr(processes, "_up", fake)
    return lambda *arguments: (CliRunner().invoke(build(), ["up", *arguments]), started)


def test_up_makes_settings_of_its_options(up, tmp_path, monkeypatch):
    """`mesh up` turns its options into settings, with absolute paths and sizes in bytes."""
    monkeypatch.chdir(tmp_path)
    result, started = up("--pods", "3", "--capacity", "1.5GiB", "--file-root", "m", "--no-samples", "-qq")
    assert result.exit_code == 0, result.output
    ((settings, how),) = started
    assert (settings.pods, settings.capacity) == (3, 3 * 2**29)
    assert settings.file_roots == (tmp_path / "m",)
    assert settings.data_dir == tmp_path / ".mesh"
    assert settings.listen == "127.0.0.1:8033"
    assert how == {"samples": False, "quiet": 2, "raw": False}


LIMITS = {
    "--max-message": ("1MiB", ["router", "runtime"]),
    "--max-forwarded-message": ("2GiB", ["router"]),
    "--max-body-bytes": ("64MiB", ["router", "runtime"]),
    "--min-body-rate": ("1KiB", ["router"]),
    "--edge-memory": ("1GiB", ["router"]),
    "--max-connections-per-pod": ("64", ["router"]),
    "--load-wait": ("7.5", ["router"]),
    "--max-waiters": ("70", ["router"]),
    "--max-waiters-per-model": ("60", ["router"]),
    "--max-waiting-bytes": ("1MiB", ["router"]),
    "--load-timeout": ("8", ["runtime"]),
    "--load-concurrency": ("3", ["runtime"]),
    "--pull-bandwidth": ("1MiB", ["runtime"]),
    "--pull-connections": ("5", ["runtime"]),
    "--hang-timeout": ("9", ["runtime"]),
}


def test_up_hands_limits_on_to_those_that_have_them(up, tmp_path):
    """`mesh up` passes limits on under the same names, but only those that are given, so the processes' own defaults
    apply."""
    result, started = up()
    assert result.exit_code == 0, result.output
    assert (started[-1][0].router_limits, started[-1][0].runtime_limits) == ((), ())
    result, started = up(*(word for name, (value, _) in LIMITS.items() for word in (name, value)))
    assert result.exit_code == 0, result.output
    settings = started[-1][0]
    argv = {
        "router": parts.router(settings, etcd_url="u", run_dir=tmp_path, session=None).argv(),
        "runtime": parts.LocalPod(settings, 1, etcd_url="u", session=None).argv(),
    }
    for name, (value, theirs) in LIMITS.items():
        for part in argv:
            found = [argv[part][at + 1] for at, word in enumerate(argv[part]) if word == name]
            assert found == ([value] if part in theirs else []), (name, part)


def test_the_limits_of_up_are_options_of_its_parts():
    for part, module in (("router", router_main), ("runtime", runtime_main)):
        options = {name for option in typer.main.get_command(module.app).params for name in option.opts}
        assert {name for name, (_, theirs) in LIMITS.items() if part in theirs} <= options


@pytest.mark.parametrize(
    "arguments",
    [
        ["--max-message", "big"],
        ["--capacity", "much"],
        ["--edge", "nginx"],
        ["--pods", "0"],
        ["--log-format", "xml"],
        ["--server-command", "run {socket}"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_up_refuses_wrong_options(up, arguments):
    result, started = up(*arguments)
    assert result.exit_code == 2
    assert arguments[0] in result.output
    assert not started


def test_a_mesh_that_cannot_be_up_says_why(monkeypatch):
    def refuse(settings, **how):
        raise processes.CommandError(str(UpError("port 8033 is taken")))

    monkeypatch.setattr(processes, "_up", refuse)
    result = CliRunner().invoke(build(), ["up"])
    assert result.exit_code == 1
    assert "port 8033 is taken" in result.stderr


def test_the_module_runs_as_a_program():
    """`python -m mesh` works without a script on PATH. An unknown command exits with 2."""
    for words in (["version"], ["--version"], ["--version", "ls"]):
        version = subprocess.run([sys.executable, "-m", "mesh", *words], capture_output=True, text=True, timeout=30)
        assert (version.returncode, version.stdout.split()[0]) == (0, "mesh")
    wrong = subprocess.run([sys.executable, "-m", "mesh", "nonsense"], capture_output=True, text=True, timeout=30)
    assert wrong.returncode == 2
