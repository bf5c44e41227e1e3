"""An engine that has other settings than it was told is refused."""

from operator import attrgetter
from types import SimpleNamespace

import pytest
import torch

from megatron_rl.errors import RunError
from megatron_rl.rollout.vllm_settings import PLACES, refuse_overruled

TOLD = {
    "tensor_parallel_size": 2,
    "dtype": "float32",
    "max_model_len": 512,
    "max_num_seqs": 256,
    "kv_cache_memory_bytes": 64 << 20,
    "seed": 0,
}


def engine(**changes):
    """The configuration of an engine that took TOLD, with these changes."""
    values = {
        "tensor_parallel_size": 2,
        "dtype": torch.float32,
        "max_model_len": 512,
        "max_num_seqs": 256,
        "kv_cache_memory_bytes": 64 << 20,
    }
    parts = {}
    for name, value in (values | changes).items():
        part, _, entry = PLACES[name].partition(".")
        parts.setdefault(part, {})[entry] = value
    return SimpleNamespace(**{part: SimpleNamespace(**own) for part, own in parts.items()})


def test_what_it_took_is_no_problem():
    refuse_overruled(TOLD, engine())


def test_everything_that_it_set_aside_is_named():
    """Such as the cache, which VLLM_CPU_KVCACHE_SPACE sizes whatever else is said."""
    changed = engine(kv_cache_memory_bytes=1 << 30, dtype=torch.bfloat16)
    with pytest.raises(RunError) as caught:
        refuse_overruled(TOLD, changed)
    assert (
        "has taken dtype=bfloat16 in the place of float32, "
        "kv_cache_memory_bytes=1073741824 in the place of 67108864. "
    ) in str(caught.value)


def test_vllm_has_all_of_them_where_we_look():
    from vllm.engine.arg_utils import EngineArgs

    config = EngineArgs.__dataclass_fields__
    assert PLACES.keys() <= config.keys()
    from vllm.config import CacheConfig, ModelConfig, ParallelConfig, SchedulerConfig

    vllm = SimpleNamespace(
        cache_config=CacheConfig.__dataclass_fields__,
        model_config=ModelConfig.__dataclass_fields__,
        parallel_config=ParallelConfig.__dataclass_fields__,
        scheduler_config=SchedulerConfig.__dataclass_fields__,
    )
    for place in PLACES.values():
        part, entry = place.split(".")
        assert entry in attrgetter(part)(vllm)
