"""The size of an engine's key/value cache on a CPU; on a GPU vLLM takes what is left to it."""

from megatron_rl.parallel.layout import Layout
from megatron_rl.weights.arch import ModelArch

LEAST_MIB = 256
BLOCK = 128  # tokens of a block of the cache on a CPU; a sequence begins with a new one


def sequence_bytes(arch: ModelArch, *, tokens: int, tp: int, itemsize: int) -> int:
    """Bytes per rank of the keys and values of a sequence, in whole blocks."""
    if arch.latent is None:
        heads = max(1, arch.num_query_groups // tp)  # ranks beyond the heads have copies
        kept = 2 * heads * arch.head_dim
    else:
        kept = arch.latent.down_rows  # the latent vector, whole on every rank
    return -(-tokens // BLOCK) * BLOCK * arch.num_layers * kept * itemsize


def policy_token_bytes(arch: ModelArch, layout: Layout, *, itemsize: int) -> int:
    """Bytes of a token's keys and values on the rank of the policy that has most layers.

    Those of latent attention are kept for every head, values as wide as keys.
    """
    heads = max(1, arch.num_query_groups // layout.tp)
    stages = layout.layers_of(arch.num_layers)
    most = max(sum(map(len, stages[rank :: layout.pp])) for rank in range(layout.pp))
    return 2 * most * heads * arch.head_dim * itemsize


def cache_mib(of_sequence: int, num_sequences: int) -> int:
    """MiB with room for so many sequences of so many bytes, and at least LEAST_MIB.

    In those, the prompts of an evaluation stay known, too.
    """
    return max(LEAST_MIB, -(-of_sequence * num_sequences // 2**20))
