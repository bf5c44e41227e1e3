"""What a rank does: a run's policy and engine at a layout, and how far apart their log-probs are.

Imported on ranks only.
"""

import os
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import preload_vllm  # noqa: F401  # isort: split
import torch
import torch.distributed as dist
from engine_models import CACHE_MIB

import megatron_rl.build_rollouts as build_module
from megatron_rl.batching.measured import measured_samples
from megatron_rl.build import build_run
from megatron_rl.config import RunConfig
from megatron_rl.parallel.groups import _free_port
from megatron_rl.parallel.stop import StopRequest
from megatron_rl.platforms.base import detect
from megatron_rl.preflight import read_inputs
from megatron_rl.rollout.engine import Request, Response
from megatron_rl.rollout.probe import NoGrader
from megatron_rl.run import Run
from megatron_rl.types import Draw, MicroBatch, Prompt, RolloutGroup
from megatron_rl.weights.layouts import engine_pieces, hf_shapes, megatron_pieces
from megatron_rl.weights.pieces import view

TEMPERATURE = 0.7  # the trainer divides its logits by it, and so must the engine
RESPONSE_TOKENS = 24


def join_as_torchrun_would() -> None:
    """The variables that vLLM's external launcher reads."""
    port = [_free_port()]
    dist.broadcast_object_list(port, src=0)
    os.environ |= {
        "RANK": str(dist.get_rank()),
        "LOCAL_RANK": str(dist.get_rank()),
        "WORLD_SIZE": str(dist.get_world_size()),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port[0]),
    }


def config_of(
    model_dir: Path,
    prompts: Path,
    rollout_tp: int,
    parallel: dict[str, Any],
    *,
    dtype: str = "float32",
    routing_replay: bool = False,
    top_k: int = -1,
) -> RunConfig:
    return RunConfig.model_validate(
        {
            "run": {"output_dir": str(model_dir.parent / "out"), "num_iterations": 3, "seed": 5},
            "model": {"path": str(model_dir), "dtype": dtype},
            "prompts": {"path": str(prompts), "prompts_per_iteration": 7, "max_prompt_tokens": 64},
            "rollout": {
                "engine": "vllm",
                "group_size": 4,
                "max_response_tokens": RESPONSE_TOKENS,
                "temperature": TEMPERATURE,
                "top_k": top_k,
                "top_p": 0.95 if top_k > 0 else 1.0,
                "tensor_model_parallel_size": rollout_tp,
                "kv_cache_mib": CACHE_MIB,
                "routing_replay": routing_replay,
            },
            "algorithm": {"preset": "grpo"},
            "batching": {"max_tokens_per_microbatch": 160},
            "optimizer": {"lr": 2e-3},
            "parallel": parallel,
            "weights": {"bucket_mib": 1, "verify_one_in": 1},
        }
    )


def build(config: RunConfig) -> tuple[Run, bool]:
    """The run, and whether building its engine left the global generators as they were."""
    join_as_torchrun_would()
    platform = detect()
    build_module.RewardScorer = lambda config: None  # type: ignore
    build_engine, untouched = build_module.build_engine, []

    def watched(*args: Any, **kwargs: Any) -> Any:
        before = rng_bytes(platform.rng_state())
        engine = build_engine(*args, **kwargs)
        untouched.append(before == rng_bytes(platform.rng_state()))
        return engine

    build_module.build_engine = watched
    inputs = read_inputs(config, dist.get_world_size())
    run = build_run(config, inputs, platform, say=lambda line: None)
    return run, untouched == [True]


def rng_bytes(states: dict[str, Any]) -> tuple[Any, ...]:
    return (
        states["python"],
        tuple(part.tobytes() if hasattr(part, "tobytes") else part for part in states["numpy"]),
        states["torch"].numpy().tobytes(),
    )


def measure(run: Run) -> dict[str, Any]:
    """Gaps and bytes at the start and after each of two updates."""
    gaps, moved, tokens, reported, wire = [], [], [], [], []
    groups: list[RolloutGroup] = []
    prompts: list[Prompt] = []
    left_rng = True
    for iteration in range(3):
        if iteration:
            before = rows_of(run, groups)
            train_once(run, groups, prompts)
            moved.append(gap(run, before)[0])  # the engine's old log-probs, the new policy's
        with counted_wire() as counted:
            report = push(run)
        assert report.verified_tensors == len(hf_shapes(run.policy.arch))
        reported.append(report.received_bytes)
        wire.append(sum(counted))
        prompts = run.prompts.next_batch()
        state = rng_bytes(run.groups.platform.rng_state())
        groups = sample(run, prompts, iteration)
        left_rng &= state == rng_bytes(run.groups.platform.rng_state())
        largest, count = gap(run, rows_of(run, groups))
        gaps.append(largest)
        tokens.append(count)
    sent = {"on_the_wire": wire, "reported": reported, "missing": missing_bytes(run)}
    return {
        "gaps": gaps,
        "moved": moved,
        "tokens": tokens,
        "bytes": everywhere(sent),
        "generate_left_rng": all(everywhere(left_rng)),
        "has_shared_memory": hasattr(torch.ops._C, "init_shm_manager"),
        "shared_memory": everywhere(shared_memory()),
        "cache_bytes": everywhere(cache_bytes(run)),
    }


def cache_bytes(run: Run) -> int:
    """What the engine's cache takes, which its layers share."""
    engine: Any = run.rollouts.engine  # type: ignore[attr-defined]
    worker = engine._llm.llm_engine.model_executor.driver_worker.worker
    held: dict[int, int] = {}

    def look(cache: Any) -> None:
        for part in cache if isinstance(cache, list | tuple) else [cache]:
            if isinstance(part, torch.Tensor):
                storage = part.untyped_storage()
                held[storage.data_ptr()] = storage.nbytes()
            else:
                look(part)

    look(worker.model_runner.kv_caches)
    return sum(held.values())


def shared_memory() -> list[str]:
    """What this process has mapped of the engine's, as the kernel names it."""
    mapped = Path("/proc/self/maps").read_text().splitlines()
    return [line for line in mapped if "/dev/shm/megatron_rl-" in line]


# -- sampling and scoring ----------------------------------------------------------------------


def sample(
    run: Run, prompts: Sequence[Prompt], iteration: int, stop: StopRequest | None = None
) -> list[RolloutGroup]:
    draw = Draw(
        purpose="train",
        group_size=run.config.rollout.group_size,
        temperature=TEMPERATURE,
        max_response_tokens=RESPONSE_TOKENS,
        top_k=run.config.rollout.top_k,
        top_p=run.config.rollout.top_p,
    )
    return run.rollouts.sampler.generate(
        prompts,
        draw,
        iteration=iteration,
        policy_version=run.policy.version,
        grader=NoGrader(),
        stop=stop,
    )


def rows_of(run: Run, groups: Sequence[RolloutGroup]) -> tuple[MicroBatch, ...]:
    return run.packer.pack_for_measuring(measured_samples(groups))


def gap(run: Run, rows: Sequence[MicroBatch]) -> tuple[float, int]:
    """Largest |policy - engine| over all sampled tokens of all ranks, and their number."""
    largest, count = torch.zeros(1, dtype=torch.float64), torch.zeros(1, dtype=torch.int64)
    for batch, own in zip(rows, run.policy.logprobs(rows) or [], strict=False):
        if len(own):
            difference = (batch.loss.rollout_logprobs - own).abs().double()
            largest = largest.maximum(difference.nan_to_num(nan=torch.inf).max())
            count += len(own) * run.groups.is_first_copy
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    dist.all_reduce(count)
    return largest.item(), int(count)


def train_once(run: Run, groups: Sequence[RolloutGroup], prompts: Sequence[Prompt]) -> None:
    """One optimizer step on rewards that say yes and no by turns."""
    graded = [
        replace(
            group,
            rollouts=tuple(
                replace(rollout, reward=1.0 if index % 2 else -1.0)
                for index, rollout in enumerate(group.rollouts)
            ),
        )
        for group in groups
    ]
    version = run.policy.version
    selection = run.selector.select(graded, prompts, iteration=1)
    batches = run.trainer.add_logprobs(run.packer.pack(selection, run.config.num_updates))
    run.trainer.update(batches)
    assert run.policy.version == version + 1


# -- bytes ---------------------------------------------------------------------------------------


@contextmanager
def counted_wire(senders: Collection[int] | None = None) -> Iterator[list[int]]:
    """Bytes that the bridge's collectives bring to this rank, one entry a call.

    From other ranks, or from those named.
    """
    import megatron_rl.weights.transfer as transfer

    stock, counted = transfer.dist.all_to_all_single, []

    def counting(arrived: Any, packed: Any, in_sizes: Any, out_sizes: Any, group: Any) -> Any:
        rank = dist.get_rank(group)
        foreign = sum(
            numel
            for sender, numel in enumerate(in_sizes)
            if sender != rank and (senders is None or sender in senders)
        )
        assert len(arrived) == sum(in_sizes)
        counted.append(foreign * arrived.element_size())
        return stock(arrived, packed, in_sizes, out_sizes, group=group)

    transfer.dist.all_to_all_single = counting
    try:
        yield counted
    finally:
        transfer.dist.all_to_all_single = stock


def missing_bytes(run: Run, *, on_node: bool = False) -> int:
    """What this rank's engine shard has and its policy shard has not: nobody can send it less.

    on_node: and no policy shard of its node has.
    """
    arch, groups = run.policy.arch, run.groups
    held = {name: torch.zeros(shape, dtype=torch.bool) for name, shape in hf_shapes(arch).items()}
    needed = {name: torch.zeros_like(mask) for name, mask in held.items()}
    for rank in range(len(groups.nodes)):
        if rank == groups.rank or (on_node and groups.nodes[rank] == groups.nodes[groups.rank]):
            for piece in megatron_pieces(arch, groups.layout, groups.layout.coordinates(rank)):
                view(held[piece.hf], piece.box).fill_(True)
    for piece in engine_pieces(arch, groups.engines, groups.engines.tp_rank_of(groups.rank)):
        view(needed[piece.hf], piece.box).fill_(True)
    return sum(int((needed[name] & ~held[name]).sum()) for name in held) * 4


def push(run: Run) -> Any:
    return run.rollouts.sync.push(run.policy.named_parameters())


# -- requests straight to the engine -------------------------------------------------------------


def requests_of(prompts: Sequence[Sequence[int]], max_tokens: int = 16) -> list[Request]:
    return [
        Request(
            key=(number, 0),
            prompt_tokens=tuple(tokens),
            temperature=1.0,
            max_tokens=max_tokens,
            seed=1000 + number,
        )
        for number, tokens in enumerate(prompts)
    ]


def answers(run: Run, requests: Sequence[Request]) -> dict[tuple[int, int], tuple[Any, ...]]:
    """Tokens and the bits of their log-probs, by key."""
    found: dict[tuple[int, int], tuple[Any, ...]] = {}

    def note(response: Response) -> None:
        assert response.key not in found
        bits = response.logprobs.view(torch.int32).tolist()
        found[response.key] = (response.tokens.tolist(), bits, response.finish_reason)

    run.rollouts.engine.generate(requests, note, lambda: True)
    return found


@contextmanager
def patched(owner: Any, name: str, value: Any) -> Iterator[None]:
    stock = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, stock)


def error_of(work: Callable[[], object], *kinds: type[BaseException]) -> str:
    """The message of the error this rank got; every rank must get one."""
    try:
        work()
    except kinds as error:
        return f"{type(error).__name__}: {error}"
    raise AssertionError(f"rank {dist.get_rank()} saw no error")


def everywhere(item: Any) -> list[Any]:
    """What all ranks have, in rank order."""
    items = [None] * dist.get_world_size()
    dist.all_gather_object(items, item)
    return items


def leave() -> None:
    """Without destructors: the engine's shutdown takes the process groups with it."""
    dist.barrier()
    os._exit(0)
