"""`excise`: write the checkpoint at any point between general (β = 0) and fine-tuned (β = 1), or beyond."""

from liborth_cli import command_module

command_module(__name__)
