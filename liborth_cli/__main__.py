"""`python -m liborth_cli` is `liborth`."""

from liborth_cli.cli.main import run

run()
