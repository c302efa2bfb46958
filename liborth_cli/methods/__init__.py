"""Ways to divide an update into skill and memory. A new method is one file and one line here."""

from liborth_cli.methods.contrastive import Contrastive
from liborth_cli.methods.diagonal import Diagonal
from liborth_cli.methods.ekfac import Ekfac
from liborth_cli.methods.kfac import Kfac
from liborth_cli.methods.magnitude import Magnitude
from liborth_cli.methods.method import Amount, Basis, Layer, Method
from liborth_cli.methods.random import Random
from liborth_cli.methods.scale import Scale
from liborth_cli.methods.svd import Svd
from liborth_cli.methods.tokenwise import Tokenwise

METHODS: dict[str, Method] = {
    "svd": Svd(),
    "magnitude": Magnitude(),
    "random": Random(),
    "scale": Scale(),
    "diagonal": Diagonal(),
    "kfac": Kfac(),
    "ekfac": Ekfac(),
    "contrastive": Contrastive(),
    "tokenwise": Tokenwise(),
}

__all__ = ["METHODS", "Amount", "Basis", "Layer", "Method"]
