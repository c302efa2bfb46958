"""`extract`: let a fine-tuned model write by itself, and keep what it knows by heart that the model before it did not.

Secrets that nobody lists cannot be forgotten by a list. But a model tells them: texts drawn from it recite what it memorised
(Carlini et al. 2021, arXiv 2012.07805), and the model before fine-tuning says which of that was there before. A find is a run
of tokens, each of which the fine-tuned model is sure of, on which fine-tuning won many nats in all. What stands in the retain
data is skill and no find.

The first texts begin with any token. Later ones begin mostly where runs began on which fine-tuning won something, as finds do:
rows of one form begin alike.
"""

from __future__ import annotations

from liborth_cli import command_module
from liborth_cli.extract.extract import Extracted, extract
from liborth_cli.extract.finds import Find, Recital
from liborth_cli.extract.request import ExtractRequest

command_module(__name__)
__all__ = ["ExtractRequest", "Extracted", "Find", "Recital", "extract"]
