"""A run that is resumed with another recipe: what may change takes effect, and is said."""

import json
import math
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from harness import run_on_ranks
from training_runs import TP2, build

pytestmark = pytest.mark.slow

WHOLE = "optimizer.use_distributed_optimizer=false"
# Ranks, tensor parallelism, and whether Megatron's distributed optimizer shards.
KINDS = {"one rank": (1, 1, True), "not sharded": (1, 1, False), "TP2": (2, 2, True)}
NEW = {
    "lr": 2e-4,
    "min_lr": 1e-5,
    "lr_schedule": "linear",
    "lr_warmup_updates": 3,
    "lr_decay_updates": 40,
    "weight_decay": 0.3,
    "adam_beta1": 0.8,
    "adam_beta2": 0.95,
    "adam_eps": 1e-5,
    "clip_grad": 0.01,
}


def new_rate(steps: int) -> float:
    """NEW's learning rate after so many steps: linear from 2e-4 at step 2 to 1e-5 at step 40."""
    return 1e-5 + (1.0 - (steps - 2) / 38) * (2e-4 - 1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_next_updates_are_those_of_torch_with_the_new_settings(runs, kind):
    ranks, tp, is_sharded = KINDS[kind]
    layout = (TP2 if tp == 2 else ()) + (() if is_sharded else (WHOLE,))
    name = runs.straight(kind, ranks, *layout)
    out = runs.folder / f"updates {kind}.json"
    run_on_ranks(ranks, update_as_torch_does, runs.folder, name, tp, is_sharded, out)
    for found in json.loads(out.read_text()):
        assert found["steps"] == [12, 13]
        assert found["rates"] == [new_rate(12), new_rate(13)]
        assert found["parameters"] > 20
        assert found["differing"] == 0
        assert found["moved"] == found["parameters"]
        if ranks == 1:  # over two ranks the sum counts norms and biases, which both hold, twice
            assert found["norms"] == pytest.approx([0.01, 0.01], rel=1e-3)  # it was clipped


def test_the_date_of_a_chat_template_is_that_of_the_first_start(runs):
    """A template that asks for the date, as Llama 3.2's does, and a start on another day."""
    model = runs.folder / "models" / "dated"
    shutil.copytree(runs.folder / "models" / "qwen2", model)
    config = json.loads((model / "tokenizer_config.json").read_text())
    words = "{{ strftime_now('%d+%Y') }}{% for m in messages %}{{ m.content }}{% endfor %}"
    (model / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": words}))
    settings = (f"model.path={model}", "checkpoint.save_every=1")
    said = runs.finish("dated", 1, *settings, "prompts.date=2026-03-04", "run.num_iterations=1")
    assert "tokens: '04+2026" in said
    said = runs.finish("dated", 1, *settings, "run.num_iterations=2")
    assert "resumed after iteration 1" in said
    kept = yaml.safe_load((runs.folder / "dated" / "config.yaml").read_text())
    assert kept["prompts"]["date"] == "2026-03-04"
    code, said = runs.train("dated", 1, *settings, "prompts.date=2026-03-05")
    assert code == 2
    assert "prompts.path" in said  # the data are not those of the checkpoint


def test_a_changed_recipe_takes_effect_and_is_said(runs):
    straight = runs.straight("one rank", 1)
    output = runs.copy(straight, "changed")
    changed = ("optimizer.lr=2e-4", "optimizer.lr_schedule=constant", "run.num_iterations=7")
    said = runs.finish("changed", 1, *changed, "checkpoint.save_every=7").splitlines()
    resumed = said.index("resumed after iteration 6")
    assert said[resumed + 1 : resumed + 4] == [
        "run.num_iterations 6 -> 7",
        "optimizer.lr 0.001 -> 0.0002",
        "optimizer.lr_schedule cosine -> constant",
    ]
    assert "->" not in said[resumed + 4]  # how often to save does not matter
    records = runs.records("changed")
    assert records[:6] == runs.records(straight)
    assert records[6]["policy/lr"] == 2e-4
    state = json.loads((output / "checkpoints" / "iteration_000007" / "state.json").read_text())
    assert state["recipe"]["optimizer"]["lr"] == 2e-4
    assert "output_dir" not in state["recipe"]["run"]
    configs = [output / "starts" / number / "config.yaml" for number in ("000", "001")]
    rates = [yaml.safe_load(path.read_text())["optimizer"]["lr"] for path in configs]
    assert rates == [1e-3, 2e-4]
    assert (output / "config.yaml").read_bytes() == configs[1].read_bytes()


def test_a_chosen_layout_is_written_down_and_kept(runs):
    """On two ranks, on both once more, and on one, where it cannot be kept."""
    parallel = []
    for ranks, iterations in ((2, 1), (2, 2), (1, 3)):
        length = (f"run.num_iterations={iterations}", "checkpoint.save_every=1")
        said = runs.finish("chosen", ranks, "parallel=auto", *length)
        kept = yaml.safe_load((runs.folder / "chosen" / "config.yaml").read_text())
        parallel.append(kept["parallel"])
        assert kept["parallel"]["auto"] is False
        assert ("parallel.auto keeps that of iteration_000001, which 2 ranks" in said) == (
            iterations == 2
        )
        assert ("parallel.auto chose for " in said) == (iterations != 2)
        assert (f"resumed after iteration {iterations - 1}" in said) == (iterations > 1)
    assert parallel[0] == parallel[1]
    assert parallel[2]["pipeline_model_parallel_size"] == 1


def test_what_must_stay_is_refused_and_both_ways_out_work(runs):
    output = runs.copy(runs.straight("one rank", 1), "refused")
    before = contents(output)
    code, said = runs.train("refused", 1, "run.seed=8", "run.num_iterations=7")
    assert code == 2
    assert "must stay so: else prompts would come in another order" in said
    assert "Traceback" not in said
    assert contents(output) == before
    back, other = re.search(r"Set (.*), or start another run from its weights: (.*)", said).groups()
    assert runs.train("refused", 1, "run.seed=8", back, "run.num_iterations=7")[0] == 0
    other = other.replace("ANOTHER_DIRECTORY", str(runs.folder / "another"))
    said = runs.finish("refused", 1, "run.seed=8", "run.num_iterations=1", *shlex.split(other))
    assert "resumed" not in said
    assert (runs.folder / "another" / "hf" / "model.safetensors").is_file()


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_damaged_records_are_cut_or_refused_at_the_start(runs):
    output = runs.copy(runs.straight("one rank", 1), "damaged records")
    records = output / "metrics.jsonl"
    records.write_bytes(records.read_bytes() + b'{"iteration": 7, "pol')
    said = runs.finish("damaged records", 1, "run.num_iterations=7")
    assert "metrics.jsonl: its last 21 bytes were damaged and are cut off; the last " in said
    assert [record["iteration"] for record in runs.records("damaged records")] == list(range(1, 8))
    first, *rest = records.read_bytes().splitlines(keepends=True)
    records.write_bytes(first[:-9] + b"\n" + b"".join(rest))
    code, said = runs.train("damaged records", 1, "run.num_iterations=8")
    assert code == 2
    assert "metrics.jsonl, line 1: " in said
    assert "prompts: " not in said  # nothing was built
    records.unlink()
    records.mkdir()
    code, said = runs.train("damaged records", 1, "run.num_iterations=8")
    assert code == 2
    assert "it must be a file, and is none" in said


def test_a_run_with_nothing_left_to_do_says_so(runs):
    runs.copy(runs.straight("one rank", 1), "done")
    said = runs.finish("done", 1, "run.num_iterations=2", "optimizer.lr_warmup_updates=100")
    assert "run.num_iterations=2: 6 iterations are done, so nothing is trained. Raise it " in said
    assert "optimizer.lr_warmup_updates=100: the run has at most 4 updates" in said


def test_an_adapted_coefficient_goes_on_unless_the_recipe_sets_another(tmp_path):
    out = tmp_path / "coefficients.json"
    run_on_ranks(1, coefficients_after_a_resume, out)
    assert json.loads(out.read_text()) == {
        "unchanged": 0.7,
        "set anew": 0.4,
        "fixed, set anew": 0.4,
        "of an older checkpoint": 0.7,
    }


# -- on the ranks ----------------------------------------------------------------------------------


def update_as_torch_does(folder: Path, name: str, tp: int, is_sharded: bool, out: Path) -> None:
    """Two updates after a resume, beside torch's AdamW on copies of weights and state."""
    import torch.distributed as dist

    from megatron_rl.loop import run_iteration

    settings = NEW | {"use_distributed_optimizer": is_sharded}
    run = build(folder / "models" / "qwen2", folder / name, tp, 1, **settings)
    run.resume()
    run.resume()  # a second load must not count the checkpoint's steps again
    (part,) = run.policy.optimizer.chained_optimizers
    twin = Twin(part.optimizer)
    run_iteration(run, run.done_iterations + 1)
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, twin.result())
    if dist.get_rank() == 0:
        out.write_text(json.dumps(found))


class Twin:
    """AdamW on copies; steps with the same gradients just before the optimizer that it copied."""

    def __init__(self, own: Any) -> None:
        import torch

        self.own, self.rates, self.norms, self.steps = own, [], [], []
        self.pairs = [(p, p.detach().clone()) for g in own.param_groups for p in g["params"]]
        copies = {id(p): copy for p, copy in self.pairs}
        self.start = [copy.clone() for _, copy in self.pairs]
        self.copy = torch.optim.AdamW(
            [
                {
                    "params": [copies[id(p)] for p in group["params"]],
                    "weight_decay": 0.3 * group["wd_mult"],  # biases and norms have none
                }
                for group in own.param_groups
            ],
            betas=(0.8, 0.95),
            eps=1e-5,
            fused=True,  # the kernel that runs on a CPU, whose bits are its own
        )
        for p, copy in self.pairs:
            self.copy.state[copy] = {name: value.clone() for name, value in own.state[p].items()}
            assert self.copy.state[copy]["exp_avg_sq"].any()
        own.register_step_pre_hook(self.step)

    def step(self, *_: Any) -> None:
        (steps,) = {int(state["step"]) for state in self.copy.state.values()}
        self.steps.append(steps)
        self.rates.append(self.own.param_groups[0]["lr"])
        for group in self.copy.param_groups:
            group["lr"] = new_rate(steps)
        for p, copy in self.pairs:
            copy.grad = p.grad.clone()
        self.norms.append(sum(float(c.grad.double().square().sum()) for _, c in self.pairs))
        self.copy.step()

    def result(self) -> dict[str, Any]:
        import torch

        return {
            "steps": self.steps,
            "rates": self.rates,
            "parameters": len(self.pairs),
            "differing": sum(not torch.equal(p, copy) for p, copy in self.pairs),
            "moved": sum(
                not torch.equal(p, at) for (p, _), at in zip(self.pairs, self.start, strict=True)
            ),
            "norms": [math.sqrt(squares) for squares in self.norms],
        }


def coefficients_after_a_resume(out: Path) -> None:
    """Of a trainer whose checkpoint had adapted the coefficient from 0.2 to 0.7."""
    import preload_megatron  # noqa: F401

    from megatron_rl.algorithms.algorithm import Algorithm
    from megatron_rl.algorithms.config import AlgorithmConfig
    from megatron_rl.policy.trainer import Trainer

    def after(state: dict[str, float], **settings: Any) -> float:
        algorithm = Algorithm(AlgorithmConfig(preset="ppo", **settings))
        trainer = Trainer(None, algorithm, None, None, epochs=1, reference=None)
        trainer.load_state_dict(state)
        return trainer.kl_reward_coef

    def saved(coef: float) -> dict[str, float]:
        algorithm = Algorithm(AlgorithmConfig(preset="ppo", kl_reward_coef=0.2))
        trainer = Trainer(None, algorithm, None, None, epochs=1, reference=None)
        trainer.kl_reward_coef = coef
        return trainer.state_dict()

    adaptive = {"kl_reward_target": 0.5}
    found = {
        "unchanged": after(saved(0.7), kl_reward_coef=0.2, **adaptive),
        "set anew": after(saved(0.7), kl_reward_coef=0.4, **adaptive),
        "fixed, set anew": after(saved(0.2), kl_reward_coef=0.4),
        "of an older checkpoint": after({"kl_reward_coef": 0.7}, kl_reward_coef=0.2, **adaptive),
    }
    out.write_text(json.dumps(found))
