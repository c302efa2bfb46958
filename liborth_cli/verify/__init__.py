"""`verify`: measure what a split did, beside its controls, and decide."""

from liborth_cli import command_module

command_module(__name__)
