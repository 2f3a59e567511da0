"""The `mmgen` command. Every command takes `--config FILE.yaml` and dotted overrides such as `--train.steps 2000`.

Each file of this package is one command or one group of commands; `commands.py` lists them.
"""

from mmgen.cli.app import main

__all__ = ["main"]
