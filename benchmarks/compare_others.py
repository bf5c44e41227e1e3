"""Others at a gate: TRL's GRPOTrainer, or a plain loop of transformers and AdamW.

benchmarks/compare.py starts it, with a Python that has TRL. Model, prompts, lengths, rewards by
place and the number of updates are those of compare_ours.py; no KL, float32, no checkpoints.
"""

import argparse
import itertools
import json
import os
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from gates import Gate

CLIP = 0.2
LR = 1e-12  # everybody samples from the same policy all the time


def reward_of_place(place: int, group_size: int) -> float:
    return place % group_size / group_size - 0.4


def plain_loop(options: argparse.Namespace, gate: Gate) -> None:
    """Several ranks have a share of the prompts each, and add up their gradients."""
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group("gloo")
        options.prompts //= dist.get_world_size()
    loop = _Loop(options)
    names = ("rollout", "reward", "logprob", "update")
    for _ in range(options.iterations):
        gate.wait()
        ends = [time.perf_counter()]
        for part in (loop.generate, loop.grade, loop.score, loop.update):
            part()
            ends.append(time.perf_counter())
        gate.note({n: b - a for n, a, b in zip(names, ends, ends[1:], strict=False)})
    gate.arrive()


class _Loop:
    """generate, advantages, old log-probs, one backward for each micro-batch, AdamW."""

    def __init__(self, options: argparse.Namespace) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self._options = options
        self._tokenizer = AutoTokenizer.from_pretrained(options.model, padding_side="left")
        self._model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
        parameters = self._model.parameters()
        self._optimizer = torch.optim.AdamW(parameters, lr=LR, weight_decay=0.0, fused=True)
        rows = [json.loads(line) for line in options.data.read_text().splitlines()]
        self._rows = itertools.cycle(rows[int(os.environ.get("RANK", "0")) :: 2])
        responses = options.prompts * options.group_size
        self._each = responses // options.updates
        micro = min(options.micro or self._each, self._each)
        self._parts = [slice(start, start + micro) for start in range(0, responses, micro)]

    def generate(self) -> None:
        options = self._options
        rows = [next(self._rows) for _ in range(options.prompts)]
        texts = [row["prompt"] for row in rows for _ in range(options.group_size)]
        read = self._tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
        self._model.eval()
        with torch.inference_mode():
            sampled = self._model.generate(
                input_ids=read["input_ids"],
                attention_mask=read["attention_mask"],
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                max_new_tokens=options.response_tokens,
                eos_token_id=-1,
                pad_token_id=0,
            )
        self._ids = sampled.clone()
        ones = self._ids.new_ones(len(self._ids), options.response_tokens)
        self._mask = torch.cat([read["attention_mask"], ones], 1)
        self._positions = (self._mask.cumsum(1) - 1).clamp(min=0)

    def grade(self) -> None:
        options = self._options
        self._tokenizer.batch_decode(self._ids[:, -options.response_tokens :])
        places = [reward_of_place(place, options.group_size) for place in range(len(self._ids))]
        rewards = torch.tensor(places).view(options.prompts, options.group_size)
        spread = rewards.std(1, keepdim=True) + 1e-6
        self._advantages = ((rewards - rewards.mean(1, keepdim=True)) / spread).flatten()

    def score(self) -> None:
        """Those of the first update are what it computes itself."""
        self._model.train()
        with torch.no_grad():
            later = [part for part in self._parts if part.start >= self._each]
            self._old = {part.start: self._logprobs(part) for part in later}

    def update(self) -> None:
        for update in range(self._options.updates):
            self._optimizer.zero_grad(set_to_none=True)
            for part in self._parts:
                if part.start // self._each == update:
                    self._loss(part).backward()
            if dist.is_initialized():
                self._add_up_gradients()
            torch.nn.utils.clip_grad_norm_(self._model.parameters(), 1.0)
            self._optimizer.step()

    def _add_up_gradients(self) -> None:
        gradients = [p.grad for p in self._model.parameters() if p.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        parts = flat.split([gradient.numel() for gradient in gradients])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))

    def _loss(self, part: slice) -> torch.Tensor:
        now = self._logprobs(part)
        ratio = (now - self._old.get(part.start, now.detach())).exp()
        gains = self._advantages[part, None]
        clipped = ratio.clamp(1 - CLIP, 1 + CLIP) * gains
        return -torch.minimum(ratio * gains, clipped).mean(1).sum() / self._each

    def _logprobs(self, part: slice) -> torch.Tensor:
        length, ids = self._options.response_tokens, self._ids[part]
        hidden = self._model.model(
            input_ids=ids, attention_mask=self._mask[part], position_ids=self._positions[part]
        ).last_hidden_state
        logits = self._model.lm_head(hidden[:, -length - 1 : -1])
        targets = ids[:, -length:]
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        return -loss.view(targets.shape)


def trl(options: argparse.Namespace, gate: Gate) -> None:
    """GRPOTrainer as its documentation sets it up for a CPU, with transformers' generation."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    world = int(os.environ.get("WORLD_SIZE", "1"))
    responses = options.prompts * options.group_size
    each = responses // options.updates
    micro = min(options.micro or each, each)
    rows = [json.loads(line) for line in options.data.read_text().splitlines()]
    data = Dataset.from_list([{"prompt": row["prompt"]} for row in rows])

    def reward(completions: list[str], **_: Any) -> list[float]:
        return [reward_of_place(place, options.group_size) for place in range(len(completions))]

    settings = GRPOConfig(
        output_dir=str(options.output),
        use_cpu=True,
        bf16=False,
        fp16=False,
        per_device_train_batch_size=micro // world,
        gradient_accumulation_steps=each // micro,
        steps_per_generation=responses // micro,
        num_generations=options.group_size,
        max_completion_length=options.response_tokens,
        num_iterations=1,
        beta=0.0,
        loss_type="grpo",
        epsilon=CLIP,
        learning_rate=LR,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=1.0,
        max_steps=options.iterations * options.updates,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        # So all have one length; where a token of many ends a response, it costs a pass over them.
        generation_kwargs={"min_new_tokens": options.response_tokens} if options.ends else None,
        gradient_checkpointing=False,
        ddp_find_unused_parameters=False,
        logging_steps=options.updates,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        seed=0,
        model_init_kwargs={"dtype": "float32", "attn_implementation": "sdpa"},
    )
    seconds: dict[str, float] = {}
    began: list[float] = []

    def timed(name: str, phase: str, *, only_without_gradient: bool = False) -> None:
        work: Callable[..., Any] = getattr(GRPOTrainer, name)

        def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
            if only_without_gradient and torch.is_grad_enabled():
                return work(self, *args, **kwargs)
            start = time.perf_counter()
            found = work(self, *args, **kwargs)
            seconds[phase] = seconds.get(phase, 0.0) + time.perf_counter() - start
            return found

        setattr(GRPOTrainer, name, watched)

    def note() -> None:
        whole = time.perf_counter() - began[-1]
        rest = whole - sum(seconds.values())
        gate.note({**seconds, "update": rest})  # and whatever the trainer does beside it
        seconds.clear()

    timed("_generate_single_turn", "rollout")
    timed("_calculate_rewards", "reward")
    timed("_get_per_token_logps_and_entropies", "logprob", only_without_gradient=True)
    generate = GRPOTrainer._generate_and_score_completions

    def gated(self: Any, inputs: Any) -> Any:
        if began:
            note()
        gate.wait()
        began.append(time.perf_counter())
        return generate(self, inputs)

    GRPOTrainer._generate_and_score_completions = gated
    trainer = GRPOTrainer(
        model=str(options.model), reward_funcs=reward, args=settings, train_dataset=data
    )
    trainer.train()
    note()
    gate.arrive()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("who", choices=("trl", "loop"))
    for name in ("model", "data", "output"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    for name in ("prompts", "group-size", "response-tokens", "updates", "iterations", "micro"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--ends", action="store_true", help="a response may end by itself")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    {"trl": trl, "loop": plain_loop}[options.who](options, Gate())
    os._exit(0)  # whatever hangs on what has been measured


if __name__ == "__main__":
    main()
