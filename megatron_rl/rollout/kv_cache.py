"""The size of an engine's cache of keys, values and states on a CPU.

On a GPU vLLM takes what is left to it.
"""

from megatron_rl.parallel.layout import Layout
from megatron_rl.weights.arch import ModelArch

LEAST_MIB = 64
BLOCK = 128  # tokens of a block of the cache on a CPU; a sequence begins with a new one


def sequence_bytes(arch: ModelArch, *, tokens: int, tp: int, itemsize: int) -> int:
    """Bytes per rank of a sequence's keys and values, in whole blocks, and of its states.

    At most: a layer with a window is taken to keep what it no longer sees, too.
    """
    if arch.latent is None:
        heads = max(1, arch.num_query_groups // tp)  # ranks beyond the heads have copies
        kept = 2 * heads * arch.head_dim
    else:
        kept = arch.latent.down_rows  # the latent vector, whole on every rank
    states = (arch.num_layers - arch.num_attention_layers) * _net_bytes(arch, tp, itemsize)
    return -(-tokens // BLOCK) * BLOCK * _kept_layers(arch) * kept * itemsize + states


def _kept_layers(arch: ModelArch) -> int:
    """Layers whose keys and values vLLM has room for, padding among them.

    Where some have a window, it keeps layers of a kind in groups as large as the rarer kind; or as
    large as the other one, where that is less than half larger.
    """
    if arch.sliding is None:
        return arch.num_attention_layers
    near = len(arch.sliding.layers)
    fewer, more = sorted((near, arch.num_attention_layers - near))
    if more < 1.5 * fewer:
        return 2 * more
    return fewer + -(-more // fewer) * fewer if fewer else more


def policy_token_bytes(arch: ModelArch, layout: Layout, *, itemsize: int) -> int:
    """Bytes of a token's keys and values on the rank of the policy that has most layers.

    Those of latent attention are kept for every head, values as wide as keys.
    """
    heads = max(1, arch.num_query_groups // layout.tp)
    most = _most_of_a_rank(arch, layout, have_attention=True)
    return 2 * most * heads * arch.head_dim * itemsize


def policy_state_bytes(arch: ModelArch, layout: Layout, *, itemsize: int) -> int:
    """Bytes of a sequence's states in gated delta nets, however long it is, on such a rank."""
    nets = _most_of_a_rank(arch, layout, have_attention=False)
    return nets * _net_bytes(arch, layout.tp, itemsize)


def _most_of_a_rank(arch: ModelArch, layout: Layout, *, have_attention: bool) -> int:
    """Layers of a kind on the pipeline rank that has most of it."""
    stages = layout.layers_of(arch.num_layers)
    return max(
        sum(arch.has_attention(n) == have_attention for stage in own for n in stage)
        for own in (stages[rank :: layout.pp] for rank in range(layout.pp))
    )


def _net_bytes(arch: ModelArch, tp: int, itemsize: int) -> int:
    """Bytes per rank of a net's state of a sequence, and of what its convolution saw last."""
    if arch.delta is None:
        return 0
    seen = (arch.delta.kernel - 1) * arch.delta.mixed_rows * itemsize
    return (arch.delta.value_rows * arch.delta.key_dim * max(4, itemsize) + seen) // tp


def cache_mib(of_sequence: int, num_sequences: int) -> int:
    """MiB with room for so many sequences of so many bytes, and at least LEAST_MIB.

    In those, the prompts of an evaluation stay known, too.
    """
    return max(LEAST_MIB, -(-of_sequence * num_sequences // 2**20))
