"""`clean`: private text out of a fine-tune, by the commands of this tool, each printed as it could be typed.

It has no surgery of its own. Rows are set aside (`aside.py`), the commands are written (`commands.py`) and carried out one by
one (`clean.py`). What they make on the way is private and lies in OUT.private (`work.py`); OUT appears when the verdict is
"passed", and not otherwise.
"""

from __future__ import annotations

from liborth_cli import command_module

command_module(__name__)
