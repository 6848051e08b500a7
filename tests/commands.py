"""How tests start commands."""

from typer.testing import CliRunner

from hf_transmiter.cli.main import app


def run(*args, code=0):
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, [str(arg) for arg in args])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result


def error(*args) -> str:
    """The one line that a failing command says."""
    result = run(*args, "--quiet", code=1)
    assert result.stdout == "" and "Traceback" not in result.stderr
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("Error: ")
    return line
