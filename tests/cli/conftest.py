"""A run's YAML file, and a run that is trained for all tests of this folder."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from mmgen.config import Config
from mmgen.train.loop import train
from tests.conftest import pairs, tiny, write_tar


@pytest.fixture
def file(config: Config, tmp_path: Path) -> Path:
    return written(config, tmp_path)


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The YAML file of a run of six steps on 4x4 and 6x4 pictures. Tests must not change it or its run folder."""
    folder = tmp_path_factory.mktemp("trained")
    shard = write_tar(folder / "train-000.tar", pairs(40))
    config = tiny(folder, data={"train": [str(shard)], "val": [str(shard)]})
    assert train(config) == 0
    return written(config, folder)


def written(config: Config, folder: Path) -> Path:
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    return path
