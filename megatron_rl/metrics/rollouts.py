"""Some responses of a run, kept to be read: rollouts.jsonl in its directory.

`megatron-rl show` makes a page of it. One line is one prompt's group:
{"iteration": 3, "prompt": "1+1?", "answer": "2", "source": "train", "group": 12, "responses":
[{"text": "...", "verdict": "correct", "extracted": "2", "reward": 1.0, "tokens": 9,
"truncated": false}]}
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_rl.metrics.config import MetricsConfig
from megatron_rl.metrics.writers import ROLLOUTS_NAME, truncate_jsonl
from megatron_rl.parallel.collectives import gather_objects
from megatron_rl.parallel.groups import Groups
from megatron_rl.types import Prompt, RolloutGroup

Record = dict[str, Any]


class RolloutLog:
    """Writes some groups of every few iterations; it is on every rank, and the main one writes."""

    def __init__(self, config: MetricsConfig, directory: Path, groups: Groups) -> None:
        """directory: the run's; groups: the process groups."""
        self._config, self._groups = config, groups
        self._path = directory / ROLLOUTS_NAME
        self._is_continued = False

    def keep(
        self, graded: Sequence[RolloutGroup], prompts: Sequence[Prompt], iteration: int
    ) -> None:
        """Write some of this iteration's groups; every rank calls it.

        graded: this rank's rollout groups. prompts: the whole batch; the kept ones are drawn from
        it evenly, so they are the same at every layout.
        """
        if not self._config.rollouts_every or iteration % self._config.rollouts_every:
            return
        step = max(1, -(-len(prompts) // self._config.rollouts_groups))
        chosen = {prompt.group_id for prompt in prompts[::step]}
        own = [to_record(group, iteration) for group in graded if group.prompt.group_id in chosen]
        gathered = gather_objects(own, self._groups.world)
        if self._groups.is_main:
            self._write(iteration, [record for part in gathered for record in part])

    def _write(self, iteration: int, records: Sequence[Record]) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        if not self._is_continued and self._path.exists():
            truncate_jsonl(self._path, iteration - 1)  # a resumed run repeats later iterations
        self._is_continued = True
        ordered = sorted(records, key=lambda record: int(record["group"]))
        with self._path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(record) + "\n" for record in ordered)


def to_record(group: RolloutGroup, iteration: int) -> Record:
    """The record of a group: a line of the file."""
    return {
        "iteration": iteration,
        "prompt": group.prompt.text,
        "answer": group.prompt.answer,
        "source": group.prompt.source,
        "group": group.prompt.group_id,
        "responses": [
            {
                "text": rollout.text,
                "verdict": None if rollout.verdict is None else str(rollout.verdict),
                "extracted": rollout.extracted,
                "reward": rollout.reward,
                "tokens": rollout.num_response_tokens,
                "truncated": rollout.finish_reason == "length",
            }
            for rollout in group.rollouts
        ],
    }
