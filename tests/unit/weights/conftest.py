import json

import pytest

from megatron_rl.weights.families.registry import read_model_config


@pytest.fixture
def read(tmp_path):
    """Reads a published config.json with some fields changed, and without others."""

    def read(config, without=(), ignored=(), **changes):
        config = {k: v for k, v in {**config, **changes}.items() if k not in without}
        (tmp_path / "config.json").write_text(json.dumps(config))
        return read_model_config(tmp_path, ignored)

    return read
