"""The entry point under the name it had before the commands moved to `cli/`: programs that import it go on working."""

from liborth_cli.cli.main import app, run

__all__ = ["app", "run"]
