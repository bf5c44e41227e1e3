import itertools
from types import SimpleNamespace

import pytest

from megatron_rl.megatron.config import ModelConfig
from megatron_rl.megatron.enter import enter
from megatron_rl.parallel.config import ParallelConfig
from megatron_rl.parallel.layout import EngineLayout, Layout, PolicyEngines
from megatron_rl.parallel.stages import EVEN, Split, splits_that_work, stage_sizes, told_sizes
from megatron_rl.platforms.base import detect

LAYOUTS = [
    Layout(world_size=8, tp=2, pp=2),
    Layout(world_size=8, tp=1, pp=2, ep=4),
    Layout(world_size=8, tp=2, pp=1, ep=4, expert_tp=1),
    Layout(world_size=8, tp=2, pp=1, ep=2),
    Layout(world_size=16, tp=4, pp=2, ep=2, expert_tp=2),
    Layout(world_size=16, tp=2, pp=2, cp=2),
    Layout(world_size=16, tp=2, pp=1, cp=4, ep=8, expert_tp=1),
    Layout(world_size=16, tp=1, pp=2, ep=2, expert_tp=4),
]


def groups_of(layout, tp, ep, cp=1):
    """Megatron-Core's own groups; its rank order is fixed in initialize_model_parallel."""
    enter(detect())
    from megatron.core.parallel_state import RankGenerator

    dp = layout.world_size // (tp * ep * cp * layout.pp)
    return RankGenerator(tp=tp, ep=ep, dp=dp, pp=layout.pp, cp=cp, order="tp-cp-ep-dp-pp")


def positions(groups, world):
    """Of each rank in its group."""
    at = {rank: position for group in groups for position, rank in enumerate(group)}
    return [at[rank] for rank in range(world)]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_ranks_sit_where_megatron_puts_them(layout):
    world = layout.world_size
    here = [layout.coordinates(rank) for rank in range(world)]
    dense = groups_of(layout, layout.tp, 1, layout.cp)
    assert [c.tp_rank for c in here] == positions(dense.get_ranks("tp"), world)
    assert [c.cp_rank for c in here] == positions(dense.get_ranks("cp"), world)
    assert [c.dp_rank for c in here] == positions(dense.get_ranks("dp"), world)
    assert [c.pp_rank for c in here] == positions(dense.get_ranks("pp"), world)
    experts = groups_of(layout, layout.etp, layout.ep)
    assert [c.etp_rank for c in here] == positions(experts.get_ranks("tp"), world)
    assert [c.ep_rank for c in here] == positions(experts.get_ranks("ep"), world)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_replicas_are_megatrons_data_parallel_groups(layout):
    found = sorted(
        layout.ranks_of_experts(etp_rank, ep_rank, pp_rank)
        for etp_rank in range(layout.etp)
        for ep_rank in range(layout.ep)
        for pp_rank in range(layout.pp)
    )
    groups = groups_of(layout, layout.etp, layout.ep).get_ranks("dp")
    assert found == sorted(map(tuple, groups))


def test_a_layout_is_made_of_the_recipes_sizes():
    config = ParallelConfig(
        tensor_model_parallel_size=2,
        pipeline_model_parallel_size=2,
        virtual_pipeline_model_parallel_size=3,
        expert_model_parallel_size=4,
        expert_tensor_parallel_size=1,
    )
    layout = config.layout(16)
    assert layout == Layout(world_size=16, tp=2, pp=2, vpp=3, ep=4, expert_tp=1)
    assert (layout.dp, layout.etp, layout.expert_dp) == (4, 1, 2)
    assert ParallelConfig(tensor_model_parallel_size=2).layout(2).etp == 2
    assert layout.split == EVEN
    uneven = ParallelConfig(
        pipeline_model_parallel_size=4,
        num_layers_in_first_pipeline_stage=1,
        num_layers_in_last_pipeline_stage=2,
    )
    assert uneven.layout(4) == Layout(world_size=4, tp=1, pp=4, split=Split(first=1, last=2))
    counting = ParallelConfig(
        account_for_embedding_in_pipeline_split=True, account_for_loss_in_pipeline_split=True
    )
    assert counting.split == Split(counts_embedding=True, counts_loss=True)


# -- stages ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_layers", "pp", "vpp", "split", "stages"),
    [
        (4, 2, 1, EVEN, [[0, 1], [2, 3]]),
        (4, 2, 2, EVEN, [[0], [1], [2], [3]]),
        (7, 4, 1, Split(last=1), [[0, 1], [2, 3], [4, 5], [6]]),
        (7, 4, 1, Split(first=1, last=2), [[0], [1, 2], [3, 4], [5, 6]]),
        (7, 4, 1, Split(counts_loss=True), [[0, 1], [2, 3], [4, 5], [6]]),
        (6, 4, 1, Split(counts_embedding=True, counts_loss=True), [[0], [1, 2], [3, 4], [5]]),
        (2, 4, 1, Split(counts_embedding=True, counts_loss=True), [[], [0], [1], []]),
        (6, 2, 2, Split(first=2), [[0], [1, 2], [3], [4, 5]]),
        (7, 2, 2, Split(counts_embedding=True), [[0], [1, 2], [3, 4], [5, 6]]),
    ],
)
def test_stages_hold_these_layers(num_layers, pp, vpp, split, stages):
    """Counted by hand; with two chunks the first and the third stage are of rank 0."""
    layout = Layout(world_size=pp, tp=1, pp=pp, vpp=vpp, split=split)
    assert [list(layers) for layers in layout.layers_of(num_layers)] == stages


def splits(num_layers):
    sizes = [None, *range(1, num_layers + 2)]
    yield from (Split(first=first, last=last) for first in sizes for last in sizes)
    for embedding, loss in itertools.product((False, True), repeat=2):
        yield Split(counts_embedding=embedding, counts_loss=loss)


def test_megatron_cuts_every_model_so():
    """Small models and every split of them, by the configuration that a run hands to Megatron."""
    cut = refused = 0
    for pp, vpp, num_layers in itertools.product((2, 3, 4), (None, 2), (1, 2, 4, 6, 7)):
        for split in splits(num_layers):
            sizes = stage_sizes(num_layers, pp, vpp or 1, split)
            assert sizes is None or sum(sizes) == num_layers
            offsets = [sum(sizes[:stage]) for stage in range(len(sizes))] if sizes else []
            expected = None if sizes is None else list(zip(sizes, offsets, strict=True))
            if sizes is None and pp == vpp == 2 and None not in (split.first, split.last):
                continue  # only one of both is handed on (faults.py, interleaving_of_ends)
            assert of_megatron(num_layers, pp, vpp, split) == expected, (pp, vpp, split)
            cut, refused = cut + (sizes is not None), refused + (sizes is None)
    assert cut > 100
    assert refused > 100


def of_megatron(num_layers, pp, vpp, split):
    """(layers, first layer) of every stage, or None where there are none."""
    enter(detect())
    from megatron.core.transformer.transformer_block import get_num_layers_to_build
    from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

    from megatron_rl.megatron.transformer_config import transformer_config

    arch = SimpleNamespace(
        num_layers=num_layers,
        hidden_size=8,
        ffn_hidden_size=8,
        num_attention_heads=1,
        num_query_groups=1,
        head_dim=8,
        rms_norm_eps=1e-6,
        qkv_bias=False,
        qk_norm=False,
        mixture=None,
        latent=None,
        delta=None,
        sliding=None,
    )
    parallel = ParallelConfig(
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=vpp,
        num_layers_in_first_pipeline_stage=split.first,
        num_layers_in_last_pipeline_stage=split.last,
        account_for_embedding_in_pipeline_split=split.counts_embedding,
        account_for_loss_in_pipeline_split=split.counts_loss,
    )
    model = ModelConfig(path="none", dtype="float32")
    try:
        config = transformer_config(arch, model, parallel, device_type="cpu")
        found = [
            (
                get_num_layers_to_build(config, vp_stage=chunk, pp_rank=rank),
                get_transformer_layer_offset(config, vp_stage=chunk, pp_rank=rank),
            )
            for chunk in (range(vpp) if vpp else [None])
            for rank in range(pp)
        ]
    except (AssertionError, ValueError):
        return None
    # It takes sizes that leave less than nothing for the ranks between.
    return found if min(size for size, _ in found) >= 0 else None


@pytest.mark.parametrize("vpp", [1, 2, 4])
@pytest.mark.parametrize("pp", [2, 3, 8])
@pytest.mark.parametrize("num_layers", [1, 2, 7, 28, 36, 61, 80])
def test_the_splits_that_are_offered_work_and_are_flat(num_layers, pp, vpp):
    for split in splits_that_work(num_layers, pp, vpp):
        sizes = stage_sizes(num_layers, pp, vpp, split)
        assert sum(sizes) == num_layers
        assert max(sizes) <= num_layers // (pp * vpp) + 1
    if stage_sizes(num_layers, pp, vpp, EVEN) is not None:
        assert splits_that_work(num_layers, pp, vpp) == [EVEN]
    elif vpp == 1 and num_layers >= pp:
        assert splits_that_work(num_layers, pp, vpp)


def test_sizes_are_told_in_short():
    assert told_sizes([2, 2, 2, 1]) == "2, 2, 2, 1"
    assert told_sizes([3, *[5] * 6, 3]) == "3, 5 (6 times), 3"


def test_the_policy_as_engines_is_one_for_each_copy_of_the_model():
    """8 ranks, TP 2 and PP 2: two copies, of ranks 0, 1, 4, 5 and of 2, 3, 6, 7."""
    engines = PolicyEngines(Layout(world_size=8, tp=2, pp=2))
    assert (engines.num_engines, engines.size, engines.told) == (2, 4, "TP 2 x PP 2")
    assert [engines.engine_of(rank) for rank in range(8)] == [0, 0, 1, 1, 0, 0, 1, 1]
    assert [engines.place_of(rank) for rank in range(8)] == [0, 1, 0, 1, 2, 3, 2, 3]
    assert engines.in_step == ((0, 1, 4, 5), (2, 3, 6, 7))


def test_context_parallel_ranks_are_engines_and_ranks_that_share_experts_step_together():
    shared = PolicyEngines(Layout(world_size=4, tp=1, pp=1, cp=2))
    assert shared.num_engines == 4
    assert shared.in_step == ((0,), (1,), (2,), (3,))
    experts = PolicyEngines(Layout(world_size=8, tp=2, pp=1, ep=2, expert_tp=2))
    assert experts.num_engines == 4
    assert experts.in_step == ((0, 1, 2, 3), (4, 5, 6, 7))
    whole_experts = PolicyEngines(Layout(world_size=4, tp=2, pp=2, ep=2, expert_tp=1))
    assert whole_experts.in_step == ((0, 1, 2, 3),)


def test_an_engine_beside_the_policy_is_as_many_consecutive_ranks():
    engines = EngineLayout(world_size=4, tp=2)
    assert (engines.num_engines, engines.size, engines.told) == (2, 2, "TP 2")
    assert engines.in_step == ((0, 1), (2, 3))
    assert [engines.place_of(rank) for rank in range(4)] == [0, 1, 0, 1]
