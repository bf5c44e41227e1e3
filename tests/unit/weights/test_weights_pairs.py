"""The bridge's bytes are the least possible ones, for random pairs of layouts up to 1,024 ranks.

What each side holds is worked out here once more, from how Megatron-Core and vLLM cut a model, with
every element of the model numbered: nothing is shared with weights/ but names and shapes.
"""

import random
from collections import Counter
from dataclasses import dataclass, replace

import numpy as np
import pytest
from weights_models import FOUR_EXPERTS, QWEN2

from megatron_rl.parallel.layout import EngineLayout, Layout
from megatron_rl.parallel.stages import Split
from megatron_rl.weights.arch import ModelArch
from megatron_rl.weights.layouts import hf_shapes
from megatron_rl.weights.sync import plan_sync

PAIRS, ITEMSIZE = 300, 2
SIZES = (1, 1, 2, 2, 2, 4, 4, 8)  # as often as they are drawn


@dataclass(frozen=True, kw_only=True)
class Pair:
    """How a model is trained and sampled; layers[chunk][pp_rank] is the number of layers there."""

    arch: ModelArch
    world: int
    tp: int
    pp: int
    vpp: int
    ep: int
    etp: int
    cp: int  # its ranks hold the same weights, as data-parallel ones do
    engine_tp: int
    split: Split
    layers: tuple[tuple[int, ...], ...]

    @property
    def layout(self) -> Layout:
        return Layout(
            world_size=self.world,
            tp=self.tp,
            cp=self.cp,
            pp=self.pp,
            vpp=self.vpp,
            ep=self.ep,
            expert_tp=self.etp,
            split=self.split,
        )


def random_pair(draw: random.Random) -> Pair:
    while True:
        tp, pp, engine_tp = draw.choice(SIZES), draw.choice((1, 2, 3, 4)), draw.choice(SIZES)
        vpp = draw.choice((1, 1, 1, 2)) if pp > 1 else 1
        cp = draw.choice((1, 2, 4))
        ep, etp = (draw.choice((1, 2, 4)), draw.choice((1, 2, 4)))
        has_experts = draw.random() < 0.4
        ep, etp = (ep, etp) if has_experts else (1, tp)
        split, layers = draw.choice(list(ways_to_cut(draw, pp, vpp)))
        world = draw.choice((2, 4, 6, 8, 12, 16, 24, 48, 64, 96, 1024))
        stage = world // pp
        if world % (tp * cp * pp) or stage % (ep * etp) or world % engine_tp:
            continue
        num_layers = sum(map(sum, layers))
        dense = frozenset(layer for layer in range(num_layers) if draw.random() < 0.3)
        arch = replace(
            QWEN2,
            num_layers=num_layers,
            num_attention_heads=8,
            head_dim=4,
            num_query_groups=draw.choice((1, 2, 4, 8)),
            ffn_hidden_size=16,
            vocab_size=draw.choice((90, 128)),
            qkv_bias=draw.random() < 0.5,
            tied_embeddings=draw.random() < 0.5,
        )
        if has_experts:
            mixture = replace(FOUR_EXPERTS, ffn_hidden_size=8, dense_layers=dense)
            arch = replace(arch, model_type="qwen3_moe", qkv_bias=False, mixture=mixture)
        return Pair(
            arch=arch,
            world=world,
            tp=tp,
            pp=pp,
            vpp=vpp,
            ep=ep,
            etp=etp,
            cp=cp,
            engine_tp=engine_tp,
            split=split,
            layers=layers,
        )


def ways_to_cut(draw: random.Random, pp: int, vpp: int):
    """Splits with the layers of each chunk of each pipeline rank, as Megatron-Core has them."""
    each = draw.choice((1, 1, 2))
    yield Split(), ((each,) * pp,) * vpp
    if pp == 1:
        return
    first, last = draw.choice((1, 2)), draw.choice((1, 2))
    between = (each,) * (pp - 2)
    yield Split(first=first * vpp), ((first, *between, each),) * vpp
    yield Split(last=last * vpp), ((each, *between, last),) * vpp
    yield Split(first=first * vpp, last=last * vpp), ((first, *between, last),) * vpp
    for embedding, loss in ((True, False), (False, True), (True, True)):
        cut = [[each] * pp for _ in range(vpp)]
        cut[0][0] -= embedding
        cut[-1][-1] -= loss
        if sum(map(sum, cut)):
            split = Split(counts_embedding=embedding, counts_loss=loss)
            yield split, tuple(map(tuple, cut))


class Numbered:
    """Every element of a model under a number of its own; what ranks hold, as sets of numbers."""

    def __init__(self, pair: Pair) -> None:
        self.pair, self.arch = pair, pair.arch
        self.ids, at = {}, 0
        for name, shape in hf_shapes(pair.arch).items():
            count = int(np.prod(shape))
            self.ids[name] = np.arange(at, at + count).reshape(shape)
            at += count
        self.count = at

    def held(self, parts) -> np.ndarray:
        mask = np.zeros(self.count, dtype=bool)
        for part in parts:
            mask[np.ravel(part)] = True
        return mask

    def trained(self, tp_rank: int, pp_rank: int, etp_rank: int, ep_rank: int) -> np.ndarray:
        pair, ids = self.pair, self.ids
        parts, layer = [], 0
        for chunk in pair.layers:
            for rank, layers in enumerate(chunk):
                for _ in range(layers):
                    if rank == pp_rank:
                        parts += self._trained_layer(layer, tp_rank, etp_rank, ep_rank)
                    layer += 1
        embedding = ids["model.embed_tokens.weight"]
        head = embedding if self.arch.tied_embeddings else ids["lm_head.weight"]
        if pp_rank == 0:
            parts.append(self._vocabulary(embedding, pair.tp, tp_rank))
        if pp_rank == pair.pp - 1:
            parts += [self._vocabulary(head, pair.tp, tp_rank), ids["model.norm.weight"]]
        return self.held(parts)

    def sampled(self, tp_rank: int) -> np.ndarray:
        """vLLM's shard: whole heads, of which each key head may stand on several ranks."""
        tp, ids, arch = self.pair.engine_tp, self.ids, self.arch
        parts = []
        for name, whole in ids.items():
            if any(proj in name for proj in ("k_proj", "v_proj")):
                heads = whole.reshape(arch.num_query_groups, -1)
                if tp <= len(heads):
                    parts.append(np.split(heads, tp)[tp_rank])
                else:
                    parts.append(heads[tp_rank // (tp // len(heads))])
            elif any(word in name for word in ("q_proj", "gate_proj", "up_proj")):
                parts.append(np.split(whole, tp)[tp_rank])
            elif any(word in name for word in ("o_proj", "down_proj")):
                parts.append(np.split(whole, tp, axis=1)[tp_rank])
            elif "embed_tokens" in name or "lm_head" in name:
                parts.append(self._vocabulary(whole, tp, tp_rank))
            else:
                parts.append(whole)
        return self.held(parts)

    def _trained_layer(self, layer: int, tp_rank: int, etp_rank: int, ep_rank: int):
        """Rows of queries, keys and values lie group by group, and are cut evenly."""
        pair, arch, prefix = self.pair, self.arch, f"model.layers.{layer}."
        own = {k.removeprefix(prefix): v for k, v in self.ids.items() if k.startswith(prefix)}
        for kind in ("weight", "bias"):
            if f"self_attn.q_proj.{kind}" in own:
                groups = [
                    own[f"self_attn.{proj}_proj.{kind}"].reshape(
                        arch.num_query_groups,
                        -1,
                        *([arch.hidden_size] if kind == "weight" else [1]),
                    )
                    for proj in "qkv"
                ]
                fused = np.concatenate(groups, axis=1).reshape(-1, groups[0].shape[-1])
                yield np.split(fused, pair.tp)[tp_rank]
        for name, whole in own.items():
            if "experts." in name:
                expert = int(name.split("experts.")[1].split(".")[0])
                if expert * pair.ep // arch.mixture.num_experts != ep_rank:
                    continue
                tp, rank = pair.etp, etp_rank
            else:
                tp, rank = pair.tp, tp_rank
            if any(word in name for word in ("gate_proj", "up_proj")):
                yield np.split(whole, tp)[rank]
            elif any(word in name for word in ("o_proj", "down_proj")):
                yield np.split(whole, tp, axis=1)[rank]
            elif "q_proj" not in name and "k_proj" not in name and "v_proj" not in name:
                yield whole  # norms and the router

    def _vocabulary(self, whole: np.ndarray, tp: int, tp_rank: int) -> np.ndarray:
        """Rows padded to a multiple of 64, which both sides divide evenly."""
        each = -(-len(whole) // 64) * 64 // tp
        return whole[tp_rank * each : (tp_rank + 1) * each]


def least_bytes(pair: Pair) -> list[int]:
    """What each rank's engine shard needs that the rank does not train."""
    numbered = Numbered(pair)
    stage = pair.world // pair.pp
    places = [
        (
            (
                rank % pair.tp,
                rank // stage,
                rank % stage % pair.etp,
                rank % stage // pair.etp % pair.ep,
            ),
            rank % pair.engine_tp,
        )
        for rank in range(pair.world)
    ]
    trained = {place: numbered.trained(*place) for place, _ in Counter(places)}
    sampled = [numbered.sampled(tp_rank) for tp_rank in range(pair.engine_tp)]
    missing = {
        both: int((sampled[both[1]] & ~trained[both[0]]).sum()) * ITEMSIZE for both in set(places)
    }
    return [missing[both] for both in places]


@pytest.mark.parametrize("seed", range(10))
def test_the_bytes_are_the_least_possible(seed):
    draw = random.Random(seed)
    for _ in range(PAIRS // 10):
        pair = random_pair(draw)
        stats = plan_sync(
            pair.arch,
            pair.layout,
            EngineLayout(world_size=pair.world, tp=pair.engine_tp),
            rank=draw.randrange(pair.world),
            itemsize=ITEMSIZE,
            mib=1,
            nodes=[rank // 8 for rank in range(pair.world)],
        ).stats
        least = least_bytes(pair)
        assert (stats.wire_total, stats.received_max) == (sum(least), max(least)), pair


def test_the_pairs_are_what_they_are_for():
    drawn = [random_pair(random.Random(seed)) for seed in range(PAIRS)]
    assert sum(pair.world == 1024 for pair in drawn) > 20
    assert sum(pair.split != Split() for pair in drawn) > 100
    assert sum(pair.arch.mixture is not None for pair in drawn) > 50
    assert sum(pair.tp > pair.arch.num_query_groups for pair in drawn) > 15
    assert any(0 in chunk for pair in drawn for chunk in pair.layers)
    assert sum(pair.cp > 1 for pair in drawn) > 100
    assert sum(map(sum, map(least_bytes, drawn[:10]))) > 0
