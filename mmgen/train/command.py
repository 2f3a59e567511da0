"""Runs commands on a run folder in processes of their own, such as the runs of an ablation."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import yaml

from mmgen.config import Config


def keep_settings(config: Config, file: str, remedy: str) -> Path:
    """Write the settings of a run to `file` in its folder, and return the path.

    Raises:
        ValueError: the file has other settings; the message ends with `remedy`.
    """
    path = config.run.dir / file
    path.parent.mkdir(parents=True, exist_ok=True)
    wanted = config.model_dump(mode="json")
    if path.exists() and yaml.safe_load(path.read_text()) != wanted:
        raise ValueError(f"{path} has other settings than this command: {remedy}")
    path.write_text(yaml.safe_dump(wanted, sort_keys=False))
    return path


def run_command(command: str, settings: Path, threads: int | None = None) -> None:
    """Run `mmgen COMMAND --config SETTINGS`, with its output in COMMAND.log next to the settings.

    `threads` limits the threads of the process, if it is not None.

    Raises:
        ChildProcessError: the command failed; the message names its log.
    """
    limits = {} if threads is None else {"OMP_NUM_THREADS": str(threads)}
    words = [sys.executable, "-m", "mmgen.cli", command, "--config", str(settings)]
    log = settings.with_name(f"{command}.log")
    with log.open("a") as output:
        code = subprocess.run(words, stdout=output, stderr=subprocess.STDOUT, env={**os.environ, **limits}).returncode
    if code:
        raise ChildProcessError(
            f"{command} of {settings.parent} ended with code {code}: see {log}. Repeat the command to continue"
        )
