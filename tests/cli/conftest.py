"""A run's YAML file, and a run that is trained for all tests of this folder."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from mmgen.config import Config


@pytest.fixture
def file(config: Config, tmp_path: Path) -> Path:
    return written(config, tmp_path)


@pytest.fixture(scope="session")
def trained(six_steps: Config) -> Path:
    """The YAML file of a trained run. Tests must not change it or its run folder."""
    return written(six_steps, six_steps.run.dir.parent)


def written(config: Config, folder: Path) -> Path:
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    return path
