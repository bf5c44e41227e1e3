"""What else is asked of an engine once it stands; each returns what rank 0 writes down.

Imported on ranks only.
"""

import signal
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from engine_on_ranks import (
    answers,
    counted_wire,
    error_of,
    everywhere,
    gap,
    missing_bytes,
    patched,
    push,
    requests_of,
    rows_of,
    sample,
    train_once,
)

import megatron_rl.build_rollouts as build_module
import megatron_rl.rollout.sampler as sampler_module
import megatron_rl.weights.sync as sync_module
from megatron_rl.errors import RunError
from megatron_rl.parallel.stop import StopRequest
from megatron_rl.run import Run


def stale_tied_head(run: Run) -> float:
    """The gap when an update leaves out the packed copy that a tied head has of its own."""
    return _gap_without(run, run.rollouts.engine.weights, "_repack_tied_head")


def unpacked_experts(run: Run) -> float:
    """The gap when an update leaves out to pack the experts, as vLLM does."""
    experts = [
        module.quant_method.moe_kernel.fused_experts
        for module in run.rollouts.engine.weights._model.modules()
        if hasattr(getattr(module, "quant_method", None), "moe_kernel")
    ]
    return _gap_without(run, type(experts[0]), "process_weights_after_loading")


def _gap_without(run: Run, owner: Any, step: str) -> float:
    """The gap after a training step whose push leaves out one step; the next push heals it."""
    prompts = run.prompts.next_batch()
    groups = sample(run, prompts, 10)
    train_once(run, groups, prompts)
    with patched(owner, step, lambda *args: None):
        push(run)
    stale, _ = gap(run, rows_of(run, sample(run, prompts, 11)))
    push(run)
    healed, _ = gap(run, rows_of(run, sample(run, prompts, 11)))
    assert healed < 1e-5
    return stale


def corruption(run: Run) -> list[str]:
    """One element of one shard of the last engine changes just before it is committed."""
    name = "model.layers.2.mlp.gate_up_proj.weight"
    weights = run.rollouts.engine.weights
    is_last = dist.get_rank() == dist.get_world_size() - 1

    def corrupting_execute(plan: Any, *rest: Any, after_bucket: Any, **named: Any) -> None:
        def corrupt_then(moves: Any) -> None:
            if is_last and any(move.module == name.rpartition(".")[0] for move in moves):
                weights[name][-1, 3] += 1e-6  # in the last row of "up"
            after_bucket(moves)

        stock_execute(plan, *rest, after_bucket=corrupt_then, **named)

    stock_execute = sync_module.execute
    with patched(sync_module, "execute", corrupting_execute):
        error = error_of(lambda: push(run), RunError)
    push(run)  # a whole push heals it
    return everywhere(error)


def skipped_commit(run: Run) -> list[str]:
    """All ranks leave one module out: nobody may sample from half an update."""
    weights = run.rollouts.engine.weights
    stock = weights.commit

    def all_but_one(modules: Any) -> None:
        stock([module for module in modules if module != "model.layers.1.self_attn.o_proj"])

    with patched(weights, "commit", all_but_one):
        error = error_of(lambda: push(run), AssertionError, RunError)
    push(run)
    return everywhere(error)


def skipped_moves(run: Run) -> list[str]:
    """A plan without the moves of one module, on all ranks."""
    part = run.rollouts.sync._parts[0]
    less = replace(
        part.plan,
        buckets=tuple(
            tuple(m for m in bucket if m.module != "model.layers.3.self_attn.qkv_proj")
            for bucket in part.plan.buckets
        ),
    )
    with patched(part, "plan", less):
        error = error_of(lambda: push(run), RunError)
    push(run)
    return everywhere(error)


def handed_on(run: Run) -> list[dict[str, int]]:
    """Bytes that come to each rank from other nodes, and that its node lacks of its engine."""
    nodes = run.groups.nodes
    own = nodes[run.groups.rank]
    with counted_wire([rank for rank, node in enumerate(nodes) if node != own]) as came:
        push(run)
    lacking = missing_bytes(run, on_node=True)
    return everywhere({"node": own, "came": sum(came), "lacking": lacking})


def probe(run: Run) -> dict[str, Any]:
    """The start-up check, on equal weights, on other ones, and on broken ones."""

    def probe() -> None:
        run.rollouts.probe(run.policy, run.packer, run.prompts.all_prompts())

    probe()
    other, broken = [], []
    params = run.policy.named_parameters()
    for kind, into in ((1.5, other), (torch.nan, broken)):
        with torch.no_grad():
            if run.groups.is_last_stage:
                norm = params["decoder.final_layernorm.weight"]
                kept = norm.clone()
                norm.mul_(kind)
            into += everywhere(error_of(probe, RunError))
            if run.groups.is_last_stage:
                norm.copy_(kept)
    probe()
    return {"agreed": True, "other": other, "nan": broken}


def seeds(run: Run) -> dict[str, bool]:
    """The same requests in other company."""
    prompts = [[4 + (7 * k + j) % 100 for j in range(1 + k)] for k in range(12)]
    requests = requests_of(prompts)
    first = answers(run, requests)
    again = answers(run, requests)
    run.rollouts.engine._llm.reset_prefix_cache()
    after_reset = answers(run, requests)
    halves = answers(run, requests[::2]) | answers(run, requests[1::2])
    single: dict[Any, Any] = {}
    for request in requests[:5]:
        single |= answers(run, [request])
    others = answers(run, requests_of(prompts[:1] * 12))
    return {
        "again": again == first,
        "after a reset": after_reset == first,
        "reversed": answers(run, requests[::-1]) == first,
        "in halves": halves == first,
        "one by one": single == {key: first[key] for key in single} and len(single) == 5,
        "other seeds differ": len({tuple(tokens) for tokens, _, _ in others.values()}) > 6,
    }


def many_prompt_tokens(run: Run) -> int:
    """12,000 prompt tokens wait where a step takes 8,192."""
    prompts = [[4 + (k * j) % 100 for j in range(60)] for k in range(200)]
    return len(answers(run, requests_of(prompts, max_tokens=3)))


def equal_ranks(run: Run) -> bool:
    found = answers(run, requests_of([[5, 9, 40 + k] for k in range(8)]))
    told = everywhere(sorted(found.items()))
    return len(told) == 2 and told[0] == told[1] and len(found) == 8


def broken_off(run: Run) -> dict[str, Any]:
    """One rank is told to stop while all sample; then the same is sampled as if nothing had been.

    What is told: the numbers of groups of every rank, broken off; and whether both others agree.
    """
    prompts = run.prompts.next_batch()

    def tokens() -> list[Any]:
        groups = sample(run, prompts, 40)
        return [[one.response_tokens.tolist() for one in group.rollouts] for group in groups]

    before, stop = tokens(), StopRequest()
    if run.groups.is_main:
        stop._note(signal.SIGTERM, None)
    with patched(sampler_module, "STEPS_BETWEEN_LOOKS", 2):
        groups = sample(run, prompts, 40, stop)
    return {
        "engines": everywhere(run.groups.engines.engine_of(run.groups.rank)),
        "groups": everywhere(len(groups)),
        "unfinished": run.rollouts.engine._llm.llm_engine.has_unfinished_requests(),
        "then as before": all(everywhere(tokens() == before)),
    }


def routed(run: Run) -> dict[str, Any]:
    """How the engine's choice of experts compares with the policy's, and what a wrong one does."""
    from megatron_rl.megatron.routers import EngineChoice

    rows = rows_of(run, sample(run, run.prompts.next_batch(), 50))
    stock, counts = EngineChoice.get_replay_topk, torch.zeros(3, dtype=torch.int64)

    def compared(self: Any, scores: Any, top_k: int, groups: Any, best: Any, choose: Any) -> Any:
        _, chosen = answer = stock(self, scores, top_k, groups, best, choose)
        _, own = choose(scores, top_k, num_groups=groups, group_topk=best)
        told = self._experts[:, 0] >= 0
        alike = (own.sort(1).values == chosen.sort(1).values).all(1)
        counts.add_(torch.stack([told.sum(), (told & alike).sum(), (~told).sum()]))
        return answer

    with patched(EngineChoice, "get_replay_topk", compared):
        own, _ = gap(run, rows)
    dist.all_reduce(counts)
    shifted = [replace(row, experts=row.experts.roll(1, 0)) for row in rows if row.samples]
    return {
        "told": int(counts[0]),
        "alike": int(counts[1]),
        "untold": int(counts[2]),
        "sequences": sum(everywhere(sum(len(row.samples) for row in rows))),
        "gap": own,
        "gap of the token before": gap(run, shifted)[0],
    }


def truncated(run: Run) -> dict[str, Any]:
    """What tokens were drawn from, and how far off a policy is that scores them among all."""
    groups = sample(run, run.prompts.next_batch(), 51)
    rows = rows_of(run, groups)
    whole = [replace(row, loss=replace(row.loss, support=None)) for row in rows]
    sizes, holds = [], True
    for rollout in (rollout for group in groups for rollout in group.rollouts):
        sizes += (rollout.support >= 0).sum(1).tolist()
        holds &= bool((rollout.support == rollout.response_tokens[:, None]).any(1).all())
    found = everywhere({"sizes": sizes, "holds": holds})
    return {
        "sizes": [size for part in found for size in part["sizes"]],
        "holds": all(part["holds"] for part in found),
        "gap": gap(run, rows)[0],
        "gap among all": gap(run, whole)[0],
    }


def spread(run: Run) -> dict[str, Any]:
    """Which prompts the engines are asked for, and on which rank groups end up."""
    prompts = run.prompts.next_batch()
    asked: list[int] = []
    engine = run.rollouts.engine
    stock = engine.generate

    def generate(requests: Any, *rest: Any) -> None:
        asked.extend(request.key[0] for request in requests if request.key[1] == 0)
        stock(requests, *rest)

    with patched(engine, "generate", generate):
        groups = sample(run, prompts, 30)
    tp = run.groups.engines.tp
    asked_everywhere = everywhere(asked)
    return {
        "num_engines": run.groups.engines.num_engines,
        "asked_by_engine_ranks_are_equal": all(
            keys == asked_everywhere[rank - rank % tp] for rank, keys in enumerate(asked_everywhere)
        ),
        "asked": asked_everywhere[::tp],
        "prompts": [prompt.group_id for prompt in prompts],
        "owned": [
            group_id
            for owned in everywhere([group.prompt.group_id for group in groups])
            for group_id in owned
        ],
    }


def policy_as_engine(run: Run) -> list[int]:
    """Greedy responses on which vLLM and the policy as an engine agree, and all of them."""
    asked = requests_of([prompt.tokens.tolist() for prompt in run.prompts.all_prompts()[:12]])
    greedy = [replace(request, temperature=0.0) for request in asked]
    of_vllm, found = answers(run, greedy), []

    def compare(response: Any) -> None:
        tokens, bits, reason = of_vllm[response.key]
        logprobs = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
        found.append(
            response.tokens.tolist() == tokens
            and response.finish_reason == reason
            and bool((logprobs - response.logprobs).abs().max() < 1e-5)
        )

    engine = build_module.policy_as_engine(run.config, run.inputs, run.groups, run.policy)
    engine.generate(greedy, compare, lambda: True)
    return [sum(found), len(greedy)]


EXTRAS: dict[str, Callable[[Run], Any]] = {
    function.__name__: function
    for function in (
        stale_tied_head,
        unpacked_experts,
        corruption,
        skipped_commit,
        skipped_moves,
        handed_on,
        probe,
        seeds,
        many_prompt_tokens,
        equal_ranks,
        broken_off,
        routed,
        truncated,
        spread,
        policy_as_engine,
    )
}
