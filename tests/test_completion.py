"""Completion by the shell: bash itself is asked what it would complete."""

import json
import shutil
import subprocess

import pytest

from sthisto.cli import main
from sthisto.cli._options import SHELLS, parser, script

ASK = """
source "$1"
COMP_WORDS=("${@:2}")
COMP_CWORD=$(( ${#COMP_WORDS[@]} - 1 ))
COMP_LINE="${COMP_WORDS[*]}" COMP_POINT=${#COMP_LINE}
_shtab_sthisto
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def bash(tmp_path_factory):
    """Give what bash offers in place of the last of some words."""
    if shutil.which("bash") is None:
        pytest.skip("there is no bash here")
    file = tmp_path_factory.mktemp("completion") / "script"
    file.write_text(script(parser(), "bash"))

    def offers(*words, folder=None):
        command = ["bash", "-c", ASK, "bash", str(file), "sthisto", *words]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=folder)
        return set(done.stdout.split())

    return offers


def commands():
    return next(action.choices for action in parser()._actions if action.dest == "command")


def test_bash_completes_commands(bash):
    assert bash("") == set(commands())
    assert bash("ups") == {"upsample"}


@pytest.mark.parametrize("command", commands())
def test_bash_completes_the_options_of_a_command(bash, command):
    options = {option for action in commands()[command]._actions for option in action.option_strings}
    assert bash(command, "--") == {option for option in options if option.startswith("--")}


def test_bash_completes_values(bash):
    assert bash("fit", "section.h5ad", "--model", "at") == {"attention"}
    assert bash("completion", "") >= set(SHELLS)


def test_bash_completes_files(bash, tmp_path):
    (tmp_path / "section.h5ad").touch()
    (tmp_path / "folder").mkdir()
    assert bash("fit", "sec", folder=tmp_path) == {"section.h5ad"}
    assert bash("fit", "section.h5ad", "--image", "", folder=tmp_path) >= {"section.h5ad"}
    assert bash("demo", "--output", "", folder=tmp_path) == {"folder"}


@pytest.mark.parametrize("shell", SHELLS)
def test_the_script_alone_is_printed(shell, capsys):
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert "sthisto" in script
    assert "upsample" in script


def test_as_json(capsys):
    assert main(["completion", "zsh", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["shell"] == "zsh"
    assert told["script"].startswith("#compdef sthisto")


def test_an_unknown_shell_is_refused(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["completion", "clam"])
    assert caught.value.code == 2
    assert "bash" in capsys.readouterr().err
