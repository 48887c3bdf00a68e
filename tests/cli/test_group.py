"""The group: what is imported when, and how mistakes are answered."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import click
import pytest

from tests.cli.conftest import Invoke, Program
from wstunnel.cli.group import COMMANDS, wstunnel

FLAGS = {
    "server": "--port --bind --proxy-protocol --trust-proxy --path --plain --cert --key --allow --source --allow-listen"
    " --max-resume-window --udp-timeout --endpoint --endpoint-auth --endpoint-text --allow-origin --state-dir"
    " -v -q --log-format",
    "invite": "--host --url --state-dir -v -q",
    "login": "--profile -v -q",
    "profiles": "-v -q",
    "client": "-L -R -D --http-proxy --dynamic-login --profile --ca --pin"
    " --proxy --header --sni -4 -6 --idle-links --resume-window --udp-timeout --exit-on-forward-failure"
    " -v -q --log-format",
    "connect": "--profile --ca --pin --proxy --header --sni -4 -6 --resume-window -v -q --log-format",
    "check": "--idle --json --profile --ca --pin --proxy --header --sni -4 -6 -v -q",
    "demo": "-v -q",
}
SIGNAL_ON_IMPORT = """
import os, signal, sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == sys.argv[1]:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Finder())
from wstunnel.cli import main
main(sys.argv[2:])
"""
URL = f"ws://{'A' * 43}@127.0.0.1:9/"


def test_version(invoke: Invoke) -> None:
    result = invoke("--version")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "wstunnel 0.1.0\n", "")


def test_version_imports_next_to_nothing(program: Program) -> None:
    code = """
import json, sys
from wstunnel.cli import main
try:
    main(["--version"])
except SystemExit as error:
    print(json.dumps([error.code, sorted(sys.modules)]))
"""
    stdout, stderr = program("-c", code).communicate(timeout=60)
    version, _, report = stdout.partition("\n")
    status, modules = json.loads(report)
    assert (version, status, stderr) == ("wstunnel 0.1.0", 0, "")
    assert "click" in modules
    heavy = {
        "trio",
        "ssl",
        "cryptography",
        "msgspec",
        "h11",
        "websockets",
        "asyncio",
        "logging",
        "subprocess",
        "socket",
    }
    assert not heavy & set(modules)
    own = {name for name in modules if name.startswith("wstunnel")}
    assert own == {"wstunnel", "wstunnel.cli", "wstunnel.cli.group", "wstunnel.cli.reports", "wstunnel.errors"}


@pytest.mark.parametrize("command", COMMANDS)
def test_command_modules_import_nothing_heavy(program: Program, command: str) -> None:
    code = f"import sys, wstunnel.cli.{command}; print(*sys.modules)"
    stdout, _ = program("-c", code).communicate(timeout=60)
    modules = set(stdout.split())
    assert f"wstunnel.cli.{command}" in modules
    assert not {"trio", "ssl", "cryptography", "msgspec", "h11", "websockets"} & modules


@pytest.mark.parametrize("flag", ["-h", "--help"])
@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example_and_only_the_flags_of_this_release(invoke: Invoke, command: str, flag: str) -> None:
    result = invoke(command, flag)
    assert result.exit_code == 0
    assert f"  wstunnel {command}" in result.stdout.split("Example")[1].replace("$ ", "")
    assert "\b" not in result.stdout
    loaded = wstunnel.get_command(click.Context(wstunnel), command)
    assert loaded is not None
    options = [parameter for parameter in loaded.params if isinstance(parameter, click.Option)]
    assert {option.opts[0] for option in options} == set(FLAGS[command].split())
    assert all(option.help for option in options)


def test_help_lists_every_command_with_a_whole_sentence(invoke: Invoke) -> None:
    result = invoke("--help")
    lines = result.stdout.split("Commands:")[1].splitlines()
    assert [line.split()[0] for line in lines[1 : 1 + len(COMMANDS)]] == list(COMMANDS)
    assert not any(line.endswith("...") for line in lines[1 : 1 + len(COMMANDS)])


def test_without_arguments_the_help_is_shown(invoke: Invoke) -> None:
    result = invoke()
    assert result.exit_code == 2
    assert "wstunnel demo" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message", "program_path"),
    [
        (["sever"], "No such command 'sever'. Did you mean 'server'?", "wstunnel"),
        (["xyz"], "No such command 'xyz'.", "wstunnel"),
        (["--vresion"], "No such option '--vresion'. Did you mean '--version'?", "wstunnel"),
        (
            ["client", "--idel-links", "3"],
            "No such option '--idel-links'. Did you mean '--idle-links'?",
            "wstunnel client",
        ),
        (["server", "--stat-dir", "x"], "No such option '--stat-dir'. Did you mean '--state-dir'?", "wstunnel server"),
        (["client", "-X", "1:a:1"], "No such option '-X'.", "wstunnel client"),
        (["server", "surplus"], "Got unexpected extra argument (surplus)", "wstunnel server"),
    ],
)
def test_mistakes(invoke: Invoke, arguments: list[str], message: str, program_path: str) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2
    first, *rest = result.stderr.splitlines()
    assert first == f"wstunnel: error: {message}"
    assert rest[0].startswith(f"Usage: {program_path} [OPTIONS]")
    assert rest[-1] == f"Try '{program_path} --help'."
    assert result.stdout == ""


@pytest.mark.parametrize(
    "arguments",
    [["--log-format", "json", "--foo"], ["--foo", "--log-format=json"], ["--log-format=json", "--idle-links", "0"]],
)
def test_mistakes_as_json(invoke: Invoke, arguments: list[str]) -> None:
    result = invoke("client", *arguments)
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert json.loads(line)["level"] == "error"


def test_a_flag_without_its_value(invoke: Invoke) -> None:
    result = invoke("server", "--port")
    assert (result.exit_code, result.stderr) == (2, "wstunnel: error: Option '--port' requires an argument.\n")


@pytest.mark.parametrize(
    ("module", "arguments"),
    [
        ("click", ["--version"]),
        ("wstunnel.cli.client", ["client", "-h"]),
        ("wstunnel.forwards", ["client", "-L", "0:a:1"]),
        ("trio", ["client", URL, "-L", "0:a:1"]),
        ("wstunnel.cli.demo_load", ["demo"]),
    ],
)
def test_interrupt_while_importing(program: Program, module: str, arguments: list[str]) -> None:
    process = program("-c", SIGNAL_ON_IMPORT, module, *arguments)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in stderr
    assert "Error" not in stderr
    assert stdout == "" or module == "wstunnel.cli.demo_load"


def test_a_reader_that_goes_away_is_met_with_silence(program: Program) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    process = program("-m", "wstunnel", "--help", stdout=writer)
    os.close(writer)
    _, stderr = process.communicate(timeout=60)
    assert (process.returncode, stderr) == (1, "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_an_error(program: Program) -> None:
    with open("/dev/full", "w") as full:
        process = program("-m", "wstunnel", "invite", "--host", "a", stdout=full)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "wstunnel: error: cannot write to standard output: No space left on device" in stderr.splitlines()[-1]


def test_installed_entry_point_is_main(program: Program) -> None:
    process = program("-m", "wstunnel", "--version", stderr=subprocess.STDOUT)
    assert process.communicate(timeout=60)[0] == "wstunnel 0.1.0\n"
    assert process.returncode == 0


SCRIPT = "import sys; from wstunnel.cli import main; main(sys.argv[1:])"


@pytest.mark.parametrize(
    ("redirection", "command", "message"),
    [
        (">/dev/full", "--version", "cannot write to standard output"),
        (">/dev/full", "--help", "cannot write to standard output"),
        (">&-", "invite", "no token was made"),
        ("<&-", "login", "standard input is closed"),
    ],
)
def test_standard_descriptors_that_do_not_work(tmp_path: Path, redirection: str, command: str, message: str) -> None:
    done = subprocess.run(
        ["sh", "-c", f'"$@" {redirection}', "sh", sys.executable, "-c", SCRIPT, command],
        env={**os.environ, "HOME": str(tmp_path), "XDG_STATE_HOME": str(tmp_path)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []
