"""A run's YAML file."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from mmgen.config import Config


@pytest.fixture
def file(config: Config, tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    return path
