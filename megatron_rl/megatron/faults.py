"""Every fault of stock Megatron-Core that this package repairs, refuses, or builds around.

A row names the versions that have the fault. Each row has a probe, which runs stock code and must
show the fault: a probe that finds none at an installed version fails its test, so that the row
learns the version or goes. Nothing else in the package spells a version of Megatron-Core. A version
that was never probed is taken to have the faults of the nearest one below it that was.
"""

import functools
import importlib.metadata
import os
import re
import sys
import warnings
from dataclasses import dataclass
from typing import Literal

from megatron_rl.errors import InputError
from megatron_rl.parallel.place import job_rank

V0_16_1, V0_19_2 = "0.16.1", "0.19.2"
SUPPORTED_VERSIONS = (V0_16_1, V0_19_2)
PYTHON_OF_0_19_2 = (3, 12)  # the oldest that it installs with
UNTESTED = "MEGATRON_RL_UNTESTED_MEGATRON"
"""The environment variable that names another version, which then runs with a warning."""

ALONE, ON_RANKS = "tests/unit/megatron/faults_alone.py", "tests/distributed/faults_on_ranks.py"


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One fault."""

    name: str
    """Also the name of its probe, a function that returns True where the fault shows."""

    versions: tuple[str, ...]
    """The supported versions that have it."""

    wrong: str
    """The rest of the sentence that begins with "Megatron-Core <version>"."""

    action: Literal["repaired", "refused", "fitted"]
    """Repaired: stock code is changed when it is imported. Refused: the configuration check ends
    the run. Fitted: a part of ours stands in its place or takes it into account."""

    by: str
    """The part of this room that does so, as module.name."""

    probes: str
    """The file with the probe: of a lone process, or of several ranks."""


FAULTS = {
    fault.name: fault
    for fault in (
        Fault(
            name="cuda_in_its_source",
            versions=SUPPORTED_VERSIONS,
            wrong="names CUDA devices in its source, so it does not run on a CPU",
            action="fitted",
            by="on_cpu.install",
            probes=ALONE,
        ),
        Fault(
            name="interleaving_without_overlap",
            versions=SUPPORTED_VERSIONS,
            wrong="posts two sends to the same peer in the interleaved schedule at PP 2 without "
            "`overlap_p2p_comm`; they cross, which makes wrong gradients without an error",
            action="refused",
            by="refusals.config_problems",
            probes=ON_RANKS,
        ),
        Fault(
            name="interleaving_of_ends",
            versions=SUPPORTED_VERSIONS,
            wrong="divides by zero in the interleaved schedule at PP 2 where both stages have a "
            "size of their own",
            action="fitted",
            by="transformer_config.transformer_config",
            probes=ALONE,
        ),
        Fault(
            name="experts_of_smaller_tensor_parallelism",
            versions=(V0_16_1,),
            wrong="reduces experts whose tensor parallelism is not the model's over data-parallel "
            "ranks only while EP is 1, so their gradients are wrong without an error",
            action="refused",
            by="refusals.config_problems",
            probes=ON_RANKS,
        ),
        Fault(
            name="weights_without_marks",
            versions=(V0_16_1,),
            wrong="leaves weights without their tensor-parallel marks where "
            "`perform_initialization` is false, so the gradient norm, and with it clipping, is "
            "wrong without an error",
            action="refused",
            by="refusals.config_problems",
            probes=ON_RANKS,
        ),
        Fault(
            name="auxiliary_losses_times_tokens",
            versions=SUPPORTED_VERSIONS,
            wrong="multiplies auxiliary losses by the token count and expects a division that "
            "loss weights which are global already leave out",
            action="fitted",
            by="routers.Routers",
            probes=ALONE,
        ),
        Fault(
            name="loss_scales_apart",
            versions=SUPPORTED_VERSIONS,
            wrong="has a loss scale of its own for experts under expert parallelism, which moves "
            "apart from the other: wrong gradients in float16 without an error",
            action="refused",
            by="refusals.config_problems",
            probes=ALONE,
        ),
        Fault(
            name="experts_without_sequence_parallelism",
            versions=SUPPORTED_VERSIONS,
            wrong="does not train experts under tensor parallelism without sequence parallelism",
            action="refused",
            by="refusals.model_problems",
            probes=ON_RANKS,
        ),
        Fault(
            name="norm_without_mark",
            versions=SUPPORTED_VERSIONS,
            wrong="leaves a norm that does not mark its weight out of the reduction over the ranks "
            "of sequence parallelism, so its gradient is wrong without an error",
            action="fitted",
            by="layers.Norm",
            probes=ON_RANKS,
        ),
        Fault(
            name="norm_of_torch",
            versions=SUPPORTED_VERSIONS,
            wrong="refuses its norm of local layers under sequence parallelism",
            action="fitted",
            by="layers.Norm",
            probes=ALONE,
        ),
        Fault(
            name="packed_local_attention",
            versions=SUPPORTED_VERSIONS,
            wrong="has no attention of packed rows without Transformer Engine",
            action="fitted",
            by="attention.PackedAttention",
            probes=ALONE,
        ),
        Fault(
            name="rope_reads_lengths",
            versions=SUPPORTED_VERSIONS,
            wrong="reads the lengths of a packed row's sequences in every layer for its unfused "
            "rope, which waits for the device",
            action="fitted",
            by="rope.Rope",
            probes=ALONE,
        ),
        Fault(
            name="rope_by_sequence",
            versions=(V0_19_2,),
            wrong="rotates a packed row sequence by sequence, where its rope is not fused",
            action="fitted",
            by="rope.Rope",
            probes=ALONE,
        ),
        Fault(
            name="latent_keys_without_reduction",
            versions=SUPPORTED_VERSIONS,
            wrong="adds up the gradient of the turning entries of keys, which all heads of latent "
            "attention share, over the heads of one rank of tensor parallelism: wrong gradients "
            "without an error",
            action="fitted",
            by="latent_attention.LatentAttention",
            probes=ON_RANKS,
        ),
        Fault(
            name="queries_without_latent_vector",
            versions=(V0_19_2,),
            wrong="refuses norms of latent attention in local layers whose queries have no latent "
            "vector",
            action="fitted",
            by="latent_attention.LatentAttention",
            probes=ALONE,
        ),
        Fault(
            name="packed_delta_nets",
            versions=(V0_16_1,),
            wrong="refuses packed rows in gated delta nets",
            action="refused",
            by="refusals.model_problems",
            probes=ALONE,
        ),
        Fault(
            name="delta_net_without_fla",
            versions=SUPPORTED_VERSIONS,
            wrong="ends in an `ImportError` where it builds a gated delta net and "
            "flash-linear-attention is not installed",
            action="repaired",
            by="repairs.build_without_fla",
            probes=ALONE,
        ),
        Fault(
            name="gated_norm_without_reduction",
            versions=(V0_19_2,),
            wrong="leaves the norm of a gated delta net's output, of which every rank of tensor "
            "parallelism has the gradient of its own heads, out of the reduction over these ranks "
            "without sequence parallelism: wrong gradients without an error",
            action="fitted",
            by="delta_net.DeltaNet",
            probes=ON_RANKS,
        ),
        Fault(
            name="no_output_hook",
            versions=(V0_16_1,),
            wrong="always computes whole logits: a model has no output hook",
            action="fitted",
            by="network.HiddenStatesModel",
            probes=ALONE,
        ),
        Fault(
            name="router_without_transformer_engine",
            versions=(V0_16_1,),
            wrong="ends in a `NameError` in the router where Transformer Engine is not installed",
            action="repaired",
            by="repairs.bind_router_product",
            probes=ALONE,
        ),
        Fault(
            name="latent_attention_without_te",
            versions=(V0_16_1,),
            wrong="ends in a `TypeError` where it builds latent attention and Transformer Engine "
            "is not installed",
            action="repaired",
            by="repairs.look_for_linear_of_te",
            probes=ALONE,
        ),
        Fault(
            name="dispatcher_without_numpy",
            versions=SUPPORTED_VERSIONS,
            wrong="makes no numpy arrays of CPU tensors, which its dispatcher of tokens expects",
            action="repaired",
            by="repairs.give_numpy_on_a_cpu",
            probes=ALONE,
        ),
        Fault(
            name="adam_without_states",
            versions=SUPPORTED_VERSIONS,
            wrong="cannot load into an Adam of torch that has not taken a step",
            action="repaired",
            by="repairs.give_states_to_load_into",
            probes=ALONE,
        ),
        Fault(
            name="adam_step_not_saved",
            versions=SUPPORTED_VERSIONS,
            wrong="ends in a `KeyError` when it loads into an Adam of torch: it copies `step`, "
            "which a checkpoint does not hold",
            action="repaired",
            by="repairs.keep_step",
            probes=ALONE,
        ),
        Fault(
            name="adam_step_shared",
            versions=SUPPORTED_VERSIONS,
            wrong="leaves all parameters of torch's Adam with one `step` tensor after a load, "
            "which advances once per parameter: wrong bias correction without an error",
            action="repaired",
            by="repairs.give_own_steps",
            probes=ALONE,
        ),
        Fault(
            name="state_of_several_buckets",
            versions=SUPPORTED_VERSIONS,
            wrong="cuts a checkpoint's optimizer state where parameters stand in a buffer with the "
            "padding of its buckets, out of tensors without that padding: all parameters after the "
            "first padded bucket (the tied embedding under PP; most of them under "
            "`overlap_grad_reduce`) are saved wrong, with a warning at most",
            action="repaired",
            by="repairs.leave_padding_out",
            probes=ALONE,
        ),
        Fault(
            name="optimizer_offload_by_copies",
            versions=SUPPORTED_VERSIONS,
            wrong="takes an optimizer's tensors off the device by copies that are not pinned, from "
            "which float32 weights do not come back as views of their buffer; on a CPU none leaves",
            action="fitted",
            by="residence.Residence",
            probes=ALONE,
        ),
        Fault(
            name="optimizers_of_a_mixture",
            versions=SUPPORTED_VERSIONS,
            wrong="has two optimizers for a mixture under expert parallelism, whose state the one "
            "optimizer of other layouts cannot load",
            action="fitted",
            by="checkpoint.fitted",
            probes=ON_RANKS,
        ),
        Fault(
            name="name_of_a_mixtures_norm",
            versions=SUPPORTED_VERSIONS,
            wrong="saves the norm before a mixture under another name by local layers than by "
            "Transformer Engine's",
            action="fitted",
            by="spec.block_spec",
            probes=ALONE,
        ),
        Fault(
            name="clipping_in_float64",
            versions=SUPPORTED_VERSIONS,
            wrong="clips float32 gradients only",
            action="refused",
            by="refusals.optimizer_problems",
            probes=ALONE,
        ),
        Fault(
            name="distributed_optimizer_in_float64",
            versions=SUPPORTED_VERSIONS,
            wrong="has no distributed optimizer of float64 parameters",
            action="fitted",
            by="model.TrainedModel",
            probes=ALONE,
        ),
    )
}


@functools.cache
def installed_version() -> str:
    """The version of megatron-core on this machine: a tested one, or the one that UNTESTED names.

    The first call warns, once per job, where the version is untested.

    Raises:
        InputError: none is installed, or an untested one that UNTESTED does not name, or UNTESTED
            names another one.
    """
    fitting = V0_19_2 if sys.version_info >= PYTHON_OF_0_19_2 else V0_16_1
    try:
        version = importlib.metadata.version("megatron-core")
    except importlib.metadata.PackageNotFoundError as error:
        raise InputError(
            f"megatron-core is not installed. Install megatron-core=={fitting}"
        ) from error
    asked, is_tested = os.environ.get(UNTESTED), version in SUPPORTED_VERSIONS
    if asked and asked != version:
        way_out = "Unset it: that one is tested" if is_tested else f"Set {UNTESTED}={version}"
        raise InputError(
            f"{UNTESTED}={asked}: megatron-core {version} is installed, and only that can be named "
            f"here. {way_out}"
        )
    if is_tested:
        return version
    if not asked:
        raise InputError(
            f"megatron-core {version} is installed: this package repairs and relies on exactly "
            f"{' or '.join(SUPPORTED_VERSIONS)}. Install megatron-core=={fitting}, or set "
            f"{UNTESTED}={version} to try it with the repairs of {nearest_tested(version)}"
        )
    if job_rank() == 0:
        warnings.warn(
            f"megatron-core {version} is not tested with this package ({UNTESTED} asks for it): it "
            f"is taken to have the faults of {nearest_tested(version)}, so a fault of its own can "
            "make wrong gradients without an error",
            stacklevel=2,
        )
    return version


def nearest_tested(version: str) -> str:
    """The newest tested version that is not newer than this one; the oldest where all are."""
    older = [tested for tested in SUPPORTED_VERSIONS if release(tested) <= release(version)]
    return max(older or SUPPORTED_VERSIONS[:1], key=release)


def release(version: str) -> tuple[int, ...]:
    """The numbers of a version, by which releases are ordered: (0, 19, 2) of 0.19.2rc1."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:3])


def is_present(name: str) -> bool:
    """True where the installed version has the fault, or is taken to have it."""
    return nearest_tested(installed_version()) in FAULTS[name].versions


def reason(name: str) -> str | None:
    """A sentence that says what the installed version does wrong; None where it does not."""
    if not is_present(name):
        return None
    return f"Megatron-Core {installed_version()} {FAULTS[name].wrong}"
