"""A run goes on at any other layout: weights and optimizer bit for bit as they were saved.

Every layout saves the same whole tensors, which no layout has computed: they are drawn.
"""

import json
from itertools import permutations
from pathlib import Path

import pytest
import torch.distributed as dist
from harness import asked_for, run_on_ranks
from layout import Layout
from tiny_models import write_model

from megatron_rl.parallel.stages import Split

pytestmark = pytest.mark.slow

SP = {"sequence_parallel": True}
MIXED = {"model": "qwen3_moe_mixed"}
SIX = {"model": "qwen2_six_layers"}
BUCKETS = {"overlaps_reduction": True}  # most of them padded
COUNTS_ENDS = Split(counts_embedding=True, counts_loss=True)
# In this order each next one switches dimensions on that the last has not, and others off.
DENSE = (
    Layout(name="DP4", world=4, **SIX),
    Layout(name="CP2 PP2 of 4, 2", world=4, cp=2, pp=2, split=Split(last=2), **BUCKETS, **SIX),
    Layout(name="TP2 SP CP2", world=4, tp=2, cp=2, **SP, **SIX),
    Layout(name="PP4 of 1, 2, 2, 1", world=4, pp=4, split=COUNTS_ENDS, **SIX),
    Layout(name="CP4", world=4, cp=4, **SIX),
    Layout(name="TP2 PP2 VPP3", world=4, tp=2, pp=2, vpp=3, **SIX),
    Layout(name="TP4 over 2 key heads", world=4, tp=4, **SIX),
)
MIXTURES = (
    Layout(name="EP2 DP4, experts", world=4, ep=2, **BUCKETS, **MIXED),
    Layout(name="CP2 PP2 of 1, 3, experts", world=4, cp=2, pp=2, split=Split(first=1), **MIXED),
    Layout(
        name="TP2 SP CP2 EP4 ETP1",
        world=4,
        tp=2,
        cp=2,
        ep=4,
        expert_tp=1,
        sequence_parallel=True,
        **MIXED,
    ),
    Layout(name="EP2 PP2 of 3, 1", world=4, ep=2, pp=2, split=Split(last=1), **MIXED),
    Layout(name="CP2 EP4", world=4, cp=2, ep=4, **MIXED),
)
BEHIND = (
    Layout(name="TP2 SP DP2, norms behind", world=4, tp=2, **SP, **BUCKETS, model="olmo2"),
    Layout(name="CP2 PP2, norms behind", world=4, cp=2, pp=2, model="olmo2"),
)
PAIRS = [
    pytest.param(
        a.name, b.name, id=f"{a.name} -> {b.name}", marks=() if is_daily else pytest.mark.exhaustive
    )
    for family in (DENSE, MIXTURES, BEHIND)
    for number, a in enumerate(family)
    for b in family
    if a != b
    for is_daily in [b == family[(number + 1) % len(family)]]
]


@pytest.fixture(scope="module")
def differing(request, tmp_path_factory):
    """Of every pair that is asked for: what differs after the load."""
    folder = tmp_path_factory.mktemp("layouts")
    pairs = set(asked_for(request, "saved", "loaded"))
    for layout in (DENSE[0], MIXTURES[0], BEHIND[0]):
        write_model(layout.model, folder / "models" / layout.model)
    run_on_ranks(4, measure, pairs, folder)
    found = json.loads((folder / "found.json").read_text())
    return {(saved, loaded): names for saved, loaded, names in found["pairs"]} | {
        "refused": found["refused"]
    }


def measure(pairs: set[tuple[str, str]], folder: Path) -> None:
    from resumes_on_ranks import loaded_by_another_kind, save_and_load

    asked = {name for pair in pairs for name in pair}
    layouts = tuple(layout for layout in (*DENSE, *MIXTURES, *BEHIND) if layout.name in asked)
    found = save_and_load(layouts, pairs, folder / "models", folder / "saved")
    refused = loaded_by_another_kind(
        folder / "saved" / layouts[0].name, layouts[0], folder / "models", is_sharded=False
    )
    if dist.get_rank() == 0:
        (folder / "found.json").write_text(json.dumps({"pairs": found, "refused": refused}))


@pytest.mark.parametrize(("saved", "loaded"), PAIRS)
def test_weights_and_optimizer_are_as_they_were_saved(differing, saved, loaded):
    assert differing[saved, loaded] == []


def test_every_two_layouts_are_among_the_pairs():
    names = {(pair.values[0], pair.values[1]) for pair in PAIRS}
    for family in (DENSE, MIXTURES, BEHIND):
        assert names >= set(permutations([layout.name for layout in family], 2))


@pytest.mark.parametrize(("saved", "loaded"), [("DP4", "CP4")])
def test_a_checkpoint_of_another_kind_of_optimizer_is_refused(differing, saved, loaded):
    assert "its optimizer has kept exp_avg, exp_avg_sq, param" in differing["refused"]
    assert "Set optimizer.use_distributed_optimizer=true, or " in differing["refused"]
