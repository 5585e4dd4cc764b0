"""A script called in this process, as from a command line."""

import sys

import pytest

from compand_jax.experiments.commands import arguments


@pytest.fixture
def call(monkeypatch, capsys):
    """Runs a script's main in this process: its exit status, its output, its errors."""

    def run(script, *given):
        monkeypatch.setattr(sys, "argv", ["script", *map(str, given)])
        try:
            status = arguments.run_script(script.main)
        except SystemExit as stop:
            status = stop.code
        return status, *capsys.readouterr()

    return run


def error_of(result):
    """The error's text: one line on stderr, nothing on stdout, and exit status 2."""
    status, out, err = result
    assert (status, out) == (2, "")
    assert err.startswith("error: ")
    assert err.endswith("\n")
    assert err.count("\n") == 1
    return err.removeprefix("error: ").strip()


def refusal_of(result):
    """The same, or else what the parser of the arguments says, its box and its lines taken away."""
    status, out, err = result
    if err.startswith("error: "):
        return error_of(result)
    assert (status, out) == (2, "")
    assert "Traceback" not in err
    return " ".join(" ".join(line.strip("│ ") for line in err.splitlines()).split())
