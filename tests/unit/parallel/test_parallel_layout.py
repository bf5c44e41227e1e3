import pytest

from megatron_rl.megatron.enter import enter
from megatron_rl.parallel.config import ParallelConfig
from megatron_rl.parallel.layout import Layout
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
