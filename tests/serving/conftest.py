"""Two runs, served."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from served import Running


@pytest.fixture(scope="module")
def second(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another run on the same base, of another rank."""
    from nybble.options.verbs import TrainConfig, load_config
    from nybble.training.session import train

    out = tmp_path_factory.mktemp("second") / "other"
    config = load_config(trained / "config.yaml", {"out": str(out), "rank": 2, "max_steps": 3})
    assert isinstance(config, TrainConfig)
    train(config)
    return out


@pytest.fixture(scope="module")
def running(trained: Path, second: Path) -> Iterator[Running]:
    server = Running([trained, second])
    yield server
    server.stop()
