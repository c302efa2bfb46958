"""K-FAC and EK-FAC factors of every linear layer, estimated from data one block at a time, and how they lie on disk."""

from liborth_cli import command_module

command_module(__name__)
