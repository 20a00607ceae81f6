import os
import signal
import subprocess
import sys

import pytest

COMMANDS = """
import sys, time, typer
from fedloom_common import errors

app = typer.Typer()

@app.command()
def spec(): raise errors.BadSpec("wrong key\\n  a.b: no such key")

@app.command()
def busy(): raise errors.Unreachable("coordinator at x:1 does not answer")

@app.command()
def wait():
    print("waiting", flush=True)
    for _ in range(6000): time.sleep(0.01)  # a signal just before a longer sleep is seen after it

@app.command()
def modules(): print(*sys.modules)

@app.command()
def bug(): raise KeyError("ours")

@app.command()
def unwritable(): open("/proc/there-is-no-such-file", "w")

alone = typer.Typer()

@alone.command()
def only(words: list[str] = typer.Option([])): print("alone", *words)
"""

ENTRY_POINTS = """
[fedloom.commands]
extra = extra_commands:app
alone = extra_commands:alone
missing = no_such_module:app
number = extra_commands:time
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Commands of another distribution, installed as far as Python can tell."""
    folder = tmp_path_factory.mktemp("site-packages")
    (folder / "extra_commands.py").write_text(COMMANDS)
    metadata = folder / "extra-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: extra\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(ENTRY_POINTS)
    path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
    return os.environ | {"PYTHONPATH": path, "COLUMNS": "120"}


FEDLOOM = [sys.executable, "-c", "from fedloom_common.cli import main; main()"]


def fedloom(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*FEDLOOM, *arguments], env=environment, capture_output=True, text=True, timeout=60, check=False
    )


def test_help_lists_every_sides_commands_without_importing_them(environment: dict[str, str]) -> None:
    done = fedloom(environment, "--help")
    assert done.returncode == 0
    for name in ("client", "coordinator", "provision", "run", "sites", "extra", "missing"):
        assert f" {name} " in done.stdout
    assert "From no_such_module:app." in done.stdout


def test_help_imports_neither_grpc_nor_torch() -> None:
    code = (
        "import sys, atexit; atexit.register(lambda: print(*sys.modules, file=sys.stderr))\n"
        "from fedloom_common.cli import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "--help"], capture_output=True, text=True, timeout=60, check=True
    )
    loaded = set(done.stderr.split())
    assert "typer" in loaded
    assert not loaded & {"torch", "grpc", "pydantic", "fedloom_client", "fedloom_server", "numpy"}


def test_only_the_chosen_commands_module_is_imported(environment: dict[str, str]) -> None:
    loaded = fedloom(environment, "extra", "modules").stdout.split()
    assert "extra_commands" in loaded
    assert not {"fedloom_client", "fedloom_server"} & set(loaded)


def test_an_app_with_one_command_needs_no_second_word(environment: dict[str, str]) -> None:
    done = fedloom(environment, "alone", "--words", "a", "--words", "b")
    assert (done.returncode, done.stdout) == (0, "alone a b\n")


def test_the_version_is_printed(environment: dict[str, str]) -> None:
    done = fedloom(environment, "--version")
    assert (done.returncode, done.stdout) == (0, "fedloom 0.1.0\n")


def test_a_failure_that_will_repeat_is_a_clean_line_and_status_2(environment: dict[str, str]) -> None:
    done = fedloom(environment, "extra", "spec")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "fedloom: wrong key\n  a.b: no such key\n"


def test_a_file_that_the_system_refuses_is_told_in_one_line(environment: dict[str, str]) -> None:
    done = fedloom(environment, "extra", "unwritable")
    assert done.returncode == 1
    assert done.stderr == "fedloom: /proc/there-is-no-such-file: No such file or directory\n"


def test_a_failure_that_may_pass_is_a_clean_line_and_status_1(environment: dict[str, str]) -> None:
    done = fedloom(environment, "extra", "busy")
    assert (done.returncode, done.stderr) == (1, "fedloom: coordinator at x:1 does not answer\n")


def test_our_own_mistake_keeps_its_traceback(environment: dict[str, str]) -> None:
    done = fedloom(environment, "extra", "bug")
    assert done.returncode == 1
    assert "KeyError: 'ours'" in done.stderr
    assert "Traceback" in done.stderr


def test_an_unknown_command_is_named(environment: dict[str, str]) -> None:
    done = fedloom(environment, "trian")
    assert done.returncode == 2
    assert "trian" in done.stderr


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("missing", "the command 'missing' cannot be loaded from no_such_module:app: ModuleNotFoundError"),
        ("number", "the command 'number' is extra_commands:time, a module, not a typer app"),
    ],
)
def test_a_broken_command_names_itself_and_spares_the_others(
    command: str, message: str, environment: dict[str, str]
) -> None:
    done = fedloom(environment, command)
    assert done.returncode == 1
    assert message in done.stderr.splitlines()[-1]
    assert fedloom(environment, "alone").returncode == 0


def test_ctrl_c_ends_with_130_and_no_traceback(environment: dict[str, str]) -> None:
    with subprocess.Popen(
        [*FEDLOOM, "extra", "wait"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "waiting\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 130
        assert "Traceback" not in process.stderr.read()
