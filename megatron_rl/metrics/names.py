"""Every metric a run may report: "room/quantity_stat" -> what the number means."""

import re

PHASES = ("rollout", "reward", "logprob", "update", "weight_sync", "evaluation", "checkpoint")
"""The timed parts of an iteration, in loop order; they may overlap (reward runs during rollout)."""

METRICS: dict[str, str] = {
    "reward/mean": "mean reward of the responses that could be graded",
    "reward/accuracy": "share of all responses drawn whose verdict is correct",
    "reward/groups_all_correct_frac": "share of prompts with only correct responses",
    "reward/groups_all_wrong_frac": "share of prompts without a correct response",
    "reward/groups_mixed_frac": "share of prompts with correct and wrong responses",
    "reward/verdict_<verdict>_frac": "share of all responses drawn with this verdict",
    "reward/part_<name>_mean": "mean value of a part of the reward, before its weight",
    "reward/first_round_accuracy": "share of correct responses in the first round alone, where "
    "every prompt has as many",
    "algorithms/kept_responses": "responses that selection passed on to the update",
    "algorithms/kept_responses_frac": "share of responses that selection passed on to the update",
    "algorithms/kept_tokens": "response tokens that selection passed on",
    "algorithms/kept_tokens_frac": "share of response tokens that selection passed on",
    "algorithms/unusable_responses": "responses that no algorithm can judge: no finite reward, or "
    "no token",
    "algorithms/wasted_responses": "responses drawn of which no gradient came: rejected, of "
    "advantage 0, or of groups that fill no batch",
    "algorithms/wasted_tokens": "their response tokens",
    "rollout/responses": "responses drawn",
    "rollout/tokens": "response tokens drawn",
    "rollout/response_tokens_mean": "mean response length in tokens",
    "rollout/response_tokens_max": "longest response in tokens",
    "rollout/rounds": "rounds of responses that the iteration took",
    "rollout/updates_behind": "optimizer steps that the policy has taken since the weights that "
    "sampled, where ranks sample ahead",
    "rollout/prompts": "prompts drawn",
    "rollout/prompts_satisfied_frac": "share of prompts that had enough right and wrong responses",
    "rollout/filled_groups": "groups with right and wrong responses that fill the batch",
    "rollout/missing_groups": "groups that the batch lacks after the most prompts that it may draw",
    "rollout/truncated_frac": "share of responses cut at the token limit",
    "rollout/entropy_estimate": "minus the mean log-prob of sampled tokens, nats per token",
    "rollout/logprob_gap_mean": "mean |old_logprobs - rollout_logprobs| over tokens, nats",
    "rollout/logprob_gap_max": "largest |old_logprobs - rollout_logprobs|, nats",
    "rollout/logprob_gap_k3": "k3 estimate of the KL from engine to trainer, nats per token",
    "rollout/tokens_per_s": "response tokens sampled per second of rollout, all ranks together",
    "rollout/support_mean": "mean number of tokens that a token was drawn from, under "
    "rollout.top_k and rollout.top_p",
    "batching/repeated_prompts_frac": "share of the tokens of updates that are a prompt again, "
    "for another response to it; batching.share_prompts spares those that share a row",
    "policy/loss": "global training loss, mean over the iteration's updates",
    "policy/entropy_mean": "mean entropy of the policy over the vocabulary, or what rollout.top_k "
    "leaves of it, nats per trained token, over the iteration's updates",
    "policy/entropy_sampled": "the same on responses drawn before selection, at the weights that "
    "the iteration begins with",
    "policy/kl_initial_k1": "KL to the initial policy, mean log-ratio (unbiased, noisy), nats",
    "policy/kl_initial_k3": "KL to the initial policy, k3 estimate (never negative), nats",
    "policy/clip_low_frac": "share of trained tokens clipped at the lower bound of the ratio",
    "policy/clip_high_frac": "share of trained tokens clipped at the upper bound of the ratio",
    "policy/dual_clip_frac": "share of trained tokens whose loss the dual clip bounds",
    "policy/kl_old_k1": "KL from the policy before the iteration to the current one, mean "
    "log-ratio, nats per trained token",
    "policy/kl_old_k3": "the same KL, k3 estimate (never negative)",
    "policy/kl_ref_k1": "KL to the reference of the loss, mean log-ratio, nats per trained token",
    "policy/kl_ref_k3": "the same KL, k3 estimate (never negative)",
    "policy/correction_mean": "mean weight that algorithm.rollout_correction gives a trained token",
    "policy/correction_bounded_frac": "share of trained tokens whose correction a bound cut, or "
    "left out",
    "policy/trained_tokens": "response tokens that the iteration's updates were computed from",
    "policy/ratio_mean": "mean of exp(logprobs - old_logprobs) over trained tokens",
    "policy/ratio_max": "largest exp(logprobs - old_logprobs) over trained tokens",
    "policy/grad_norm": "global gradient norm before clipping, mean over the iteration's updates",
    "policy/lr": "learning rate of the iteration's last update",
    "policy/load_balancing_loss": "how unevenly experts are chosen, without its coefficient, mean "
    "over layers; 1: evenly",
    "policy/router_z_loss": "mean square of the logarithm of the routers' summed exponentials, "
    "without its coefficient, mean over layers",
    "policy/expert_overload": "by which share the most chosen expert exceeds the mean of all, mean "
    "over layers; 0: evenly",
    "policy/pairs": "preference pairs of an update",
    "policy/pairs_preferred_frac": "share of pairs whose margin is positive",
    "policy/pair_margin_mean": "mean of the preferred response's log-ratio to the reference, less "
    "the other's, nats",
    "critic/loss": "value loss, mean over the iteration's updates",
    "critic/clip_frac": "share of values whose loss the clip decides",
    "critic/value_mean": "mean value of response tokens before the iteration's updates",
    "critic/return_mean": "mean return of response tokens",
    "critic/explained_variance": "1 - variance of (return - value) / variance of returns",
    "critic/grad_norm": "global gradient norm of the critic before clipping",
    "critic/lr": "learning rate of the critic's last update",
    "critic/load_balancing_loss": "the same as the policy's, of the critic's routers",
    "critic/router_z_loss": "the same as the policy's, of the critic's routers",
    "critic/expert_overload": "the same as the policy's, of the critic's routers",
    "critic/kl_per_response": "KL to the reference that rewards paid for, nats per response",
    "critic/kl_reward_coef": "coefficient of that KL",
    "policy/updates": "optimizer steps taken in this iteration",
    "policy/nonfinite_updates": "optimizer steps left out, since loss or gradient was not finite",
    "critic/nonfinite_updates": "the same of the critic",
    "policy/scaler_skipped": "optimizer steps left out, since gradients times the loss scale "
    "overflowed in float16",
    "critic/scaler_skipped": "the same of the critic",
    "policy/loss_scale": "what the loss of the iteration's last update was multiplied by, in "
    "float16",
    "critic/loss_scale": "the same of the critic",
    "policy/skipped_updates": "optimizer steps left out, since nothing was kept for them",
    "policy/tokens_per_s": "tokens trained per second of update, all ranks together",
    "weights/sync_bytes": "bytes sent between ranks to bring the engine up to date",
    "weights/verified_tensors": "tensors of the engine that this sync proved by checksum",
    **{f"time/{phase}_s": f"seconds of the {phase} phase" for phase in PHASES},
    "time/iteration_s": "seconds of the whole iteration, with its evaluation and the checkpoint "
    "after the one before",
    "time/sampling_s": "seconds that separate ranks took to sample and grade the iteration",
    "memory/sampling_gib": "the same as memory/peak_gib, on the ranks that only sample",
    "memory/peak_gib": "highest accelerator memory in use on any rank, on a CPU its largest "
    "resident memory, GiB",
    **{
        f"memory/planned_{name}_gib": f"what `plan` says that memory/{name}_gib is"
        for name in ("peak", "rollout", "update")
    },
    **{
        f"memory/{phase}_gib": f"accelerator memory in use at the end of the {phase} phase on any "
        "rank, with what torch keeps of it for itself; on a CPU what the process holds, GiB"
        for phase in PHASES
    },
    "evaluation/<benchmark>/average_at_k": "held-out accuracy, mean over k responses per question",
    "evaluation/<benchmark>/pass_at_k": "share of held-out questions with a right response among k",
    "evaluation/<benchmark>/majority_at_k": "share of held-out questions that k responses solve by "
    "majority, ties as expected value",
    "evaluation/<benchmark>/truncated_frac": "share of held-out responses cut at the token limit",
    "evaluation/<benchmark>/wrong_frac": "share of held-out responses with a wrong answer",
    "evaluation/<benchmark>/no_answer_frac": "share of held-out responses without an answer to "
    "grade",
    "evaluation/<benchmark>/timeout_frac": "share of held-out responses whose verification took "
    "too long; they count as not correct",
    "evaluation/<benchmark>/error_frac": "share of held-out responses whose verification failed; "
    "they count as not correct",
    "evaluation/<benchmark>/response_tokens_mean": "mean held-out response length in tokens",
}

_VERDICT = re.compile(r"reward/verdict_[a-z_]+_frac")
_PART = re.compile(r"reward/part_.+_mean")
_EVALUATION = re.compile(r"evaluation/(?P<benchmark>.+)/average_at_(?P<k>k|\d+)")
_OF_BENCHMARK = re.compile(r"evaluation/.+/(?P<measure>[a-z_]+?)(?P<k>(?<=_at_)\d+)?")


def meaning(name: str) -> str | None:
    """The meaning of a metric; None for a name that no room may report."""
    if match := _OF_BENCHMARK.fullmatch(name):
        k = "k" if match["k"] else ""
        return METRICS.get(f"evaluation/<benchmark>/{match['measure']}{k}")
    if _VERDICT.fullmatch(name):
        return METRICS["reward/verdict_<verdict>_frac"]
    if _PART.fullmatch(name):
        return METRICS["reward/part_<name>_mean"]
    return METRICS.get(name)


def is_evaluation(name: str) -> bool:
    """True for the held-out accuracy of a benchmark."""
    return _EVALUATION.fullmatch(name) is not None


def evaluation_label(name: str) -> str:
    """The name as people say it: "evaluation/aime24/average_at_8" -> "aime24 average@8"."""
    match = _EVALUATION.fullmatch(name)
    if match is None:
        raise ValueError(f"{name!r} is not evaluation/<benchmark>/average_at_<k>")
    return f"{match['benchmark']} average@{match['k']}"
