"""Probes of megatron_rl/megatron/faults.py that need one process: each runs stock Megatron-Core.

    python faults_alone.py [--repaired] NAME ...

prints a JSON object: name of a fault -> whether it shows. Megatron-Core runs on the CPU without
Transformer Engine and Apex, adapted to it unless that is what is probed; nothing is repaired unless
it is asked for.
"""

import inspect
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache, partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

TOKENS = 5


def cuda_in_its_source() -> bool:
    from megatron.core import tensor_parallel

    return _raises(
        (AssertionError, RuntimeError), tensor_parallel.model_parallel_cuda_manual_seed, 1
    )


def interleaving_of_ends() -> bool:
    from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

    config = SimpleNamespace(
        pipeline_model_parallel_size=2,
        virtual_pipeline_model_parallel_size=2,
        pipeline_model_parallel_layout=None,
        num_layers=6,
        num_layers_in_first_pipeline_stage=2,
        num_layers_in_last_pipeline_stage=4,
    )
    return _raises(ZeroDivisionError, partial(get_transformer_layer_offset, config, 1, pp_rank=1))


def auxiliary_losses_times_tokens() -> bool:
    per_token, per_row = _router_gradient(per_token=True), _router_gradient(per_token=False)
    # As a whole: how single small ones are rounded depends on the processor.
    return bool((per_token - TOKENS * per_row).norm() < 1e-5 * per_token.norm())


def loss_scales_apart() -> bool:
    """Of two optimizers of one model one overflows: does its scale fall alone?"""
    from megatron.core.optimizer.grad_scaler import DynamicGradScaler
    from megatron.core.optimizer.optimizer import ChainedOptimizer, MixedPrecisionOptimizer

    _lone_rank()

    class Part(MixedPrecisionOptimizer):
        """What a test needs of it."""

    Part.__abstractmethods__ = frozenset()

    def part(gradient: float) -> Any:
        one = Part.__new__(Part)
        one.config, one.is_stub_optimizer = SimpleNamespace(timers=None), False
        one.grad_scaler, one.found_inf = (
            DynamicGradScaler(4.0, 1.0, 2.0, 0.5, 10, 1),
            torch.zeros(1),
        )
        one._copy_model_grads_to_main_grads = lambda: None
        one._collect_main_grad_data_for_unscaling = lambda: [torch.tensor([gradient])]
        one.get_grad_stats_parallel_group = lambda: dist.group.WORLD
        return one

    both = ChainedOptimizer.__new__(ChainedOptimizer)
    both.chained_optimizers = [part(1.0), part(torch.inf)]
    both.prepare_grads()
    of_shared, of_experts = (one.get_loss_scale().item() for one in both.chained_optimizers)
    return bool(of_shared != of_experts)


def norm_of_torch() -> bool:
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    config = _config(sequence_parallel=True, tensor_model_parallel_size=2, normalization="RMSNorm")
    return _raises(AssertionError, WrappedTorchNorm, config, 8)


def packed_local_attention() -> bool:
    from megatron.core.packed_seq_params import PackedSeqParams
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.enums import AttnMaskType

    _lone_rank()
    attention = DotProductAttention(_config(), 1, AttnMaskType.causal, "self")
    bounds = torch.tensor([0, 3, 5], dtype=torch.int32)
    row = PackedSeqParams(qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds)
    qkv = [torch.randn(5, 1, 2, 4) for _ in range(3)]
    mask = torch.ones(1, 1, 5, 5).triu(1).bool()
    return _raises(AssertionError, lambda: attention(*qkv, mask, packed_seq_params=row))


def queries_without_latent_vector() -> bool:
    from megatron.core.transformer.identity_op import IdentityOp
    from megatron.core.transformer.multi_latent_attention import MLASelfAttentionSubmodules
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    try:
        from megatron.core.transformer.mla_qk_norm_config import QKNormConfigResolver
    except ImportError:
        return False
    config = SimpleNamespace(
        q_lora_rank=None,
        qk_layernorm=True,
        qk_l2_norm=False,
        experimental_attention_variant=None,
        normalization="RMSNorm",
        transformer_impl="local",
    )
    parts = MLASelfAttentionSubmodules(
        linear_proj=IdentityOp, q_layernorm=IdentityOp, kv_layernorm=WrappedTorchNorm
    )
    return _raises((RuntimeError, ValueError), QKNormConfigResolver(config, parts).resolve)


def rope_reads_lengths() -> bool:
    reads, _ = _calls_of_a_rotation()
    return reads > 0


def rope_by_sequence() -> bool:
    _, rotations = _calls_of_a_rotation()
    return rotations > 1


def no_output_hook() -> bool:

    from megatron.core.models.gpt import GPTModel

    return "output_processor" not in inspect.signature(GPTModel.forward).parameters


def router_without_transformer_engine() -> bool:
    from megatron.core.transformer.moe.moe_utils import router_gating_linear

    tokens, weight = torch.randn(3, 8), torch.randn(4, 8)
    return _raises(NameError, router_gating_linear, tokens, weight, None, torch.float32)


def latent_attention_without_te() -> bool:
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer import MLATransformerConfig
    from megatron.core.transformer.identity_op import IdentityOp
    from megatron.core.transformer.multi_latent_attention import (
        MLASelfAttention,
        MLASelfAttentionSubmodules,
    )

    _lone_rank()
    sizes = ("q_lora_rank", "kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim")
    config = MLATransformerConfig(
        num_layers=1,
        hidden_size=8,
        num_attention_heads=2,
        use_cpu_initialization=True,
        rope_type="rope",
        **dict.fromkeys(sizes, 4),
    )
    linears = ("q_proj", "q_down_proj", "q_up_proj", "kv_down_proj", "kv_up_proj")
    parts = MLASelfAttentionSubmodules(
        **{f"linear_{name}": ColumnParallelLinear for name in linears},
        linear_proj=RowParallelLinear,
        core_attention=IdentityOp,
        q_layernorm=IdentityOp,
        kv_layernorm=IdentityOp,
    )
    return _raises(TypeError, MLASelfAttention, config, parts, 1)


def packed_delta_nets() -> bool:
    from megatron.core.packed_seq_params import PackedSeqParams
    from megatron.core.ssm import gated_delta_net

    with mock.patch.object(getattr(gated_delta_net, "common", gated_delta_net), "HAVE_FLA", True):
        net = _delta_net()
    hidden, bounds = torch.randn(5, 1, 8), torch.tensor([0, 3, 5], dtype=torch.int32)
    row = PackedSeqParams(qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds)
    with suppress(AssertionError):  # newer ones take them, but by kernels that need a GPU
        return _raises(NotImplementedError, lambda: net(hidden, None, packed_seq_params=row))
    return False


def delta_net_without_fla() -> bool:
    return _raises(ImportError, _delta_net)


def dispatcher_without_numpy() -> bool:
    from megatron.core.transformer.moe import token_dispatcher

    return torch.is_tensor(token_dispatcher.maybe_move_tensor_to_cpu(torch.zeros(2), as_numpy=True))


def adam_without_states() -> bool:
    module, optimizer = _optimizer()
    return _raises(AssertionError, _sharded, module, optimizer)


def adam_step_not_saved() -> bool:
    from megatron.core import dist_checkpointing

    module, optimizer = _stepped()
    with tempfile.TemporaryDirectory() as folder:
        dist_checkpointing.save(_sharded(module, optimizer), folder)
        loaded = dist_checkpointing.load(_sharded(module, optimizer), folder)
    return _raises(KeyError, optimizer.load_state_dict, loaded["optimizer"])


def adam_step_shared() -> bool:
    _, optimizer = _stepped()
    optimizer.load_state_dict(optimizer.state_dict())
    steps = [state["step"] for state in optimizer.chained_optimizers[0].optimizer.state.values()]
    assert len(steps) == 2
    return steps[0] is steps[1]


def state_of_several_buckets() -> bool:
    """Of a bias and a weight, each in a bucket: are other main weights saved than they have?"""
    module, optimizer = _stepped(overlap_grad_reduce=True, bucket_size=1)
    (buffer,) = optimizer.chained_optimizers[0].buffers
    assert [bucket.numel_unpadded for bucket in buffer.buckets] == [8, 64]
    saved = _sharded(module, optimizer)["optimizer"]["param_state"].values()
    bias, weight = (state["param"].data for state in saved)
    assert bias.equal(module.module.bias)
    return not weight.equal(module.module.weight)


def optimizer_offload_by_copies() -> bool:
    """Nothing leaves a CPU, and nothing in the source pins, or keeps a view one."""

    _, optimizer = _stepped()
    inner = optimizer.chained_optimizers[0]
    optimizer.offload_to_cpu()
    stays = all(
        state["exp_avg"].untyped_storage().nbytes() for state in inner.optimizer.state.values()
    )
    source = inspect.getsource(type(inner).offload_to_cpu)
    return stays and "p.data = p.data.cpu()" in source and "pin_memory" not in source


def name_of_a_mixtures_norm() -> bool:
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec

    _lone_rank()
    spec = get_gpt_decoder_block_spec(
        _mixture(), use_transformer_engine=False, normalization="RMSNorm"
    )
    return "pre_mlp_layernorm." in spec.layer_specs[0].submodules.sharded_state_dict_keys_map


def clipping_in_float64() -> bool:
    from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32

    parameter = torch.nn.Parameter(torch.ones(2, dtype=torch.float64))
    parameter.grad = torch.ones_like(parameter)
    return _raises(AssertionError, clip_grad_by_total_norm_fp32, [parameter], 1.0, 2.0)


def distributed_optimizer_in_float64() -> bool:
    return _raises(TypeError, _optimizer, torch.float64)


# -- what they are made of -------------------------------------------------------------------------


def _raises(kind: Any, work: Callable[..., Any], *args: Any) -> bool:
    try:
        work(*args)
    except kind:
        return True
    return False


@cache
def _lone_rank() -> None:
    from megatron.core import parallel_state, tensor_parallel

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(1)


def _config(**changes: Any) -> Any:
    from megatron.core.transformer import TransformerConfig

    small = {
        "num_layers": 1,
        "hidden_size": 8,
        "num_attention_heads": 2,
        "persist_layer_norm": False,
    }
    return TransformerConfig(**{**small, "use_cpu_initialization": True, **changes})


def _delta_net() -> Any:
    from megatron.core.ssm.gated_delta_net import GatedDeltaNet, GatedDeltaNetSubmodules
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    _lone_rank()
    config = _config(
        normalization="RMSNorm",
        linear_conv_kernel_dim=2,
        linear_key_head_dim=4,
        linear_value_head_dim=4,
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        deterministic_mode=True,
    )
    parts = GatedDeltaNetSubmodules(
        in_proj=ColumnParallelLinear, out_norm=WrappedTorchNorm, out_proj=RowParallelLinear
    )
    group = SimpleNamespace(tp=dist.group.WORLD, cp=dist.group.WORLD)
    return GatedDeltaNet(config, parts, 1, pg_collection=group)


def _mixture(**changes: Any) -> Any:
    experts = {"num_moe_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 8}
    return _config(**experts, add_bias_linear=False, **changes)


def _router_gradient(*, per_token: bool) -> Tensor:
    """Of an auxiliary loss alone, over TOKENS tokens."""
    from megatron.core.transformer.moe import moe_utils
    from megatron.core.transformer.moe.router import TopKRouter

    _lone_rank()
    config = _mixture(
        moe_router_load_balancing_type="aux_loss",
        moe_aux_loss_coeff=1.0,
        calculate_per_token_loss=per_token,
    )
    torch.manual_seed(0)
    router = TopKRouter(config, moe_utils.get_default_pg_collection())
    router.set_layer_number(1)
    router.weight.data.normal_()
    with mock.patch.object(moe_utils, "te_general_gemm", None, create=True):  # a row of its own
        probabilities, _ = router(torch.randn(TOKENS, 1, 8))
        (0 * probabilities).sum().backward()
    gradient: Tensor = router.weight.grad
    assert gradient.abs().max() > 0
    return gradient


def _calls_of_a_rotation() -> tuple[int, int]:
    """(lists made of tensors, rotations) while a packed row of two sequences is rotated."""
    from megatron.core import parallel_state
    from megatron.core.models.common.embeddings import rope_utils

    _lone_rank()
    bounds, row, angles = torch.tensor([0, 3, 5]), torch.randn(5, 2, 4), torch.randn(3, 1, 1, 4)
    group = parallel_state.get_context_parallel_group()
    with (
        _counted(Tensor, "tolist") as lists,
        _counted(rope_utils, "_apply_rotary_pos_emb_bshd") as rotations,
    ):
        rope_utils.apply_rotary_pos_emb(row, angles, _config(), bounds, cp_group=group)
    assert rotations
    return len(lists), len(rotations)


@contextmanager
def _counted(where: Any, name: str) -> Iterator[list[None]]:
    """Stock code, with an entry for each of its calls."""
    stock, calls = getattr(where, name), []

    def call(*args: Any, **settings: Any) -> Any:
        calls.append(None)
        return stock(*args, **settings)

    with mock.patch.object(where, name, call):
        yield calls


def _optimizer(dtype: torch.dtype = torch.float32, **buckets: Any) -> tuple[Any, Any]:
    """A linear layer with its bias, and torch's Adam of both under the distributed optimizer."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.tensor_parallel import ColumnParallelLinear

    _lone_rank()
    config = _config(params_dtype=dtype)
    linear = ColumnParallelLinear(8, 8, config=config, init_method=torch.nn.init.normal_)
    ddp_config = DistributedDataParallelConfig(use_distributed_optimizer=True, **buckets)
    module = DistributedDataParallel(config, ddp_config, linear)
    settings = OptimizerConfig(
        optimizer="adam", lr=0.1, params_dtype=dtype, use_distributed_optimizer=True
    )
    return module, get_megatron_optimizer(settings, [module])


def _stepped(**buckets: Any) -> tuple[Any, Any]:
    module, optimizer = _optimizer(**buckets)
    module.zero_grad_buffer()
    output, bias = module(torch.ones(2, 1, 8))
    (output.sum() + (0 if bias is None else bias.sum())).backward()
    module.finish_grad_sync()
    optimizer.step()
    return module, optimizer


def _sharded(module: Any, optimizer: Any) -> dict[str, Any]:
    from megatron.core import parallel_state

    metadata = {
        "distrib_optim_sharding_type": "fully_reshardable",
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }
    weights = module.module.sharded_state_dict(metadata=metadata)
    return {"optimizer": optimizer.sharded_state_dict(weights, metadata=metadata)}


if __name__ == "__main__":
    for absent in ("transformer_engine", "apex"):
        sys.modules[absent] = None  # type: ignore[assignment]
    is_repaired = sys.argv[1] == "--repaired"
    asked = sys.argv[2:] if is_repaired else sys.argv[1:]

    from megatron_rl.megatron import on_cpu, repairs

    if asked != ["cuda_in_its_source"]:
        on_cpu.install()
    if is_repaired:
        repairs.apply()
    sys.stdout.write(json.dumps({name: globals()[name]() for name in asked}))
