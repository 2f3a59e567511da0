"""Fixtures of the data tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmgen.config import Config
from tests.conftest import tiny
from tests.data.common import write_shards


@pytest.fixture
def streamed(tmp_path: Path) -> Config:
    shards = write_shards(tmp_path / "shards")
    return tiny(tmp_path, data={"train": shards, "streams": 4, "window": 12}, train={"batch_rows": 8})
