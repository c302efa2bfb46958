"""The inner loops: each op beside the torch code that specifies it. Knows nothing of files or of liborth_cli.

Import the submodules; this package imports none of them, so that what needs no torch starts without it.
"""
