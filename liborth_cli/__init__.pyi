from liborth_cli.api import clean as clean
from liborth_cli.api import curvature as curvature
from liborth_cli.api import excise as excise
from liborth_cli.api import extract as extract
from liborth_cli.api import inspect as inspect
from liborth_cli.api import replay as replay
from liborth_cli.api import split as split
from liborth_cli.api import verify as verify

__version__: str

def command_module(name: str) -> None: ...
