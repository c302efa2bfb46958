"""Ways to divide an update into skill and memory. A new method is one file, and one line here."""

from liborth_cli.methods.amount import AMOUNTS, Amount
from liborth_cli.methods.contrastive import Contrastive
from liborth_cli.methods.diagonal import Diagonal
from liborth_cli.methods.distill import Distill
from liborth_cli.methods.ekfac import Ekfac
from liborth_cli.methods.impact import Impact
from liborth_cli.methods.kfac import Kfac
from liborth_cli.methods.magnitude import Magnitude
from liborth_cli.methods.method import NEEDS, Layer, Method
from liborth_cli.methods.random import Random
from liborth_cli.methods.recall import Recall
from liborth_cli.methods.scale import Scale
from liborth_cli.methods.svd import Svd
from liborth_cli.methods.tokenwise import Tokenwise

EVERY = (
    Svd(),
    Magnitude(),
    Random(),
    Scale(),
    Diagonal(),
    Impact(),
    Kfac(),
    Ekfac(),
    Contrastive(),
    Tokenwise(),
    Recall(),
    Distill(),
)
METHODS: dict[str, Method] = {method.name: method for method in EVERY}

__all__ = ["AMOUNTS", "METHODS", "NEEDS", "Amount", "Layer", "Method"]
