"""A run that was interrupted ends where it would have ended, and what it exports is the policy.

Supervised, so that no engine is needed; runs are started as a user starts them.
"""

import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from engine_models import QUICKSTART, write_model
from harness import run_on_ranks

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
LAST = "iteration_000006"
TP2 = ("parallel.tensor_model_parallel_size=2",)
PP2 = ("parallel.pipeline_model_parallel_size=2",)
EP2 = ("parallel.expert_model_parallel_size=2",)
LAYOUTS = {"one rank": (1, ()), "TP2": (2, TP2)}
WEIGHTS_IN = "policy/__"  # files that hold tensors, of weights and optimizer
RUN_ON_CLOCK = ("time/", "memory/", "tokens_per_s")


def recipe_of(model_dir: Path, output_dir: Path) -> dict[str, Any]:
    """Six iterations of two updates each; the learning rate changes at every update."""
    return {
        "run": {"output_dir": str(output_dir), "num_iterations": 6, "seed": 7},
        "model": {"path": str(model_dir), "dtype": "float32"},
        "prompts": {
            "path": str(QUICKSTART / "data" / "train.jsonl"),
            "prompts_per_iteration": 12,
            "max_prompt_tokens": 64,
        },
        "rollout": {"max_response_tokens": 96},
        "algorithm": {"preset": "sft"},
        "batching": {"max_tokens_per_microbatch": 160},
        "optimizer": {
            "lr": 1e-3,
            "lr_schedule": "cosine",
            "lr_warmup_updates": 2,
            "lr_decay_updates": 13,
            "prompts_per_update": 6,
        },
        "checkpoint": {"save_every": 3},
    }


class Runs:
    """Starts runs in a folder; a run is its output directory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def train(self, name: str, ranks: int, *overrides: str) -> tuple[int, str]:
        return self.start("train", name, ranks, *overrides)

    def start(self, command: str, name: str, ranks: int, *overrides: str) -> tuple[int, str]:
        """Exit code and everything printed."""
        recipe = self.folder / f"{name}.yaml"
        recipe.write_text(
            yaml.safe_dump(recipe_of(self.folder / "models" / "qwen2", self.folder / name))
        )
        start = ["-m", "megatron_rl"]
        if ranks > 1:
            start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
            start += ["-m", "megatron_rl"]
        # A pipe, as `| tee` is: it closes when the last process of the run has ended.
        done = subprocess.run(
            [sys.executable, *start, command, str(recipe), *overrides],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=900,
        )
        return done.returncode, done.stdout

    def finish(self, name: str, ranks: int, *overrides: str) -> str:
        code, said = self.train(name, ranks, *overrides)
        assert code == 0, said
        return said

    def copy(self, name: str, as_name: str) -> Path:
        shutil.copytree(self.folder / name, self.folder / as_name)
        return self.folder / as_name

    def records(self, name: str) -> list[dict[str, Any]]:
        """Metrics, without what a clock or the machine says."""
        lines = (self.folder / name / "metrics.jsonl").read_text().splitlines()
        return [
            {k: v for k, v in json.loads(line).items() if not any(c in k for c in RUN_ON_CLOCK)}
            for line in lines
        ]

    def files(self, name: str) -> dict[str, list[Any]]:
        """Size and digest of every file of the last checkpoint but the index of tensors, a pickle
        whose bytes depend on addresses."""
        manifest = self.folder / name / "checkpoints" / LAST / "MANIFEST.json"
        files = json.loads(manifest.read_text())["files"]
        del files["policy/.metadata"]
        return files


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for name in ("qwen2", "qwen2_tied", "qwen3_moe"):
        write_model(name, folder / "models" / name)
    return Runs(folder)


@pytest.fixture(scope="module", params=LAYOUTS)
def interrupted(runs, request):
    """A run straight to its end, and one that stopped after four iterations and went on."""
    ranks, layout = LAYOUTS[request.param]
    straight, stopped = f"straight {request.param}", f"stopped {request.param}"
    runs.finish(straight, ranks, *layout)
    runs.finish(stopped, ranks, *layout, "run.num_iterations=4")
    assert [record["iteration"] for record in runs.records(stopped)] == [1, 2, 3, 4]
    said = runs.finish(stopped, ranks, *layout)
    return straight, stopped, said


def test_resumed_weights_and_optimizer_are_bit_equal(runs, interrupted):
    straight, stopped, said = interrupted
    assert "resumed after iteration 3" in said
    expected, found = runs.files(straight), runs.files(stopped)
    assert sum(name.startswith(WEIGHTS_IN) for name in expected) >= 2
    for name in expected:  # cursor and schedule too; nothing is drawn from Python's generator,
        if not name.startswith("rank_"):  # which starts elsewhere in every process
            assert found[name] == expected[name], name
    assert found.keys() == expected.keys()
    assert exported(runs.folder / stopped) == exported(runs.folder / straight)


def test_resumed_metrics_are_equal_and_repeated_ones_are_cut_off(runs, interrupted):
    """Iteration 4 ran twice, and stands there once."""
    straight, stopped, _ = interrupted
    records = runs.records(stopped)
    assert [record["iteration"] for record in records] == [1, 2, 3, 4, 5, 6]
    assert records == runs.records(straight)
    rates = [record["policy/lr"] for record in records]
    assert len(set(rates)) == 6  # else a schedule that starts anew could not be seen
    losses = [record["policy/loss"] for record in records]
    assert len(set(losses)) == 6


def test_training_moves_the_weights(runs, interrupted):
    straight, _, _ = interrupted
    start = (runs.folder / "models" / "qwen2" / "model.safetensors").read_bytes()
    assert exported(runs.folder / straight) != start


def exported(output_dir: Path) -> bytes:
    return (output_dir / "hf" / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def straight_tp2(runs):
    if not (runs.folder / "straight TP2").exists():
        runs.finish("straight TP2", 2, *TP2)
    return "straight TP2"


def test_another_layout_continues_with_the_same_loss(runs, straight_tp2):
    output = runs.copy(straight_tp2, "TP2 to PP2")
    shutil.rmtree(output / "checkpoints" / LAST)
    said = runs.finish("TP2 to PP2", 2, *PP2)
    assert "resumed after iteration 3" in said
    check_continuation(runs.records(straight_tp2), runs.records("TP2 to PP2"))


def test_experts_continue_at_another_layout(runs):
    """With expert parallelism Megatron has two optimizers, and without it one: there and back."""
    settings = (f"model.path={runs.folder / 'models' / 'qwen3_moe'}", "run.num_iterations=8")
    runs.finish("EP2", 2, *settings, *EP2)
    shutil.rmtree(runs.copy("EP2", "EP2 to PP2 to EP2") / "checkpoints" / LAST)
    for layout, start, end in ((PP2, 3, 6), (EP2, 6, 8)):
        changed = (*settings, *layout, f"run.num_iterations={end}")
        said = runs.finish("EP2 to PP2 to EP2", 2, *changed)
        assert f"resumed after iteration {start}" in said
    check_continuation(runs.records("EP2"), runs.records("EP2 to PP2 to EP2"))


def check_continuation(expected: list[dict[str, Any]], found: list[dict[str, Any]]) -> None:
    assert found[:3] == expected[:3]
    assert len(found) == len(expected) >= 6
    for there, here in zip(expected[3:], found[3:], strict=True):
        for name in ("policy/loss", "policy/grad_norm", "policy/entropy_mean"):
            # float32 sums in another order
            assert here[name] == pytest.approx(there[name], rel=1e-6), name
        assert here["policy/lr"] == there["policy/lr"]


def test_a_damaged_checkpoint_is_named_and_the_run_repeats_from_the_one_before(runs, straight_tp2):
    output = runs.copy(straight_tp2, "damaged")
    flip_byte(output / "checkpoints" / LAST / "policy" / "__1_0.distcp")
    expected = runs.files(straight_tp2)
    said = runs.finish("damaged", 2, *TP2)
    assert f"checkpoint rejected: {LAST}: policy/__1_0.distcp was changed" in said
    assert "resumed after iteration 3" in said
    assert runs.files("damaged") == expected  # random states too
    assert runs.records("damaged") == runs.records(straight_tp2)


def test_where_all_checkpoints_are_bad_nothing_starts_afresh(runs, straight_tp2):
    output = runs.copy(straight_tp2, "all bad")
    for checkpoint in (output / "checkpoints").iterdir():
        (checkpoint / "MANIFEST.json").unlink()
    before = sorted(output.rglob("*")), (output / "metrics.jsonl").read_bytes()
    code, said = runs.train("all bad", 2, *TP2)
    assert code != 0
    assert "no usable checkpoint: iteration_000006: no readable MANIFEST.json; " in said
    assert "iteration_000003: no readable MANIFEST.json" in said
    assert (sorted(output.rglob("*")), (output / "metrics.jsonl").read_bytes()) == before


def flip_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


# What is done to a file of the newest checkpoint, and what is said of it.
DAMAGES = {
    "rank 0's tensors": ("policy/__0_0.distcp", flip_byte, "was changed after it was written"),
    "rank 1's tensors": ("policy/__1_0.distcp", flip_byte, "was changed after it was written"),
    "random states": ("rank_1.pt", flip_byte, "was changed after it was written"),
    "state": ("state.json", flip_byte, "was changed after it was written"),
    "cut off": ("policy/__0_1.distcp", cut, "bytes instead of"),
    "missing": ("policy/.metadata", Path.unlink, "is missing"),
    "missing manifest": ("MANIFEST.json", Path.unlink, "no readable MANIFEST.json"),
    "manifest cut off": ("MANIFEST.json", cut, "no readable MANIFEST.json"),
}


@pytest.fixture(scope="module")
def damaged(runs, straight_tp2):
    out = runs.folder / "damaged.json"
    run_on_ranks(2, load_damaged, runs.folder, straight_tp2, out)
    return json.loads(out.read_text())


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_rejected_by_name(damaged, damage):
    file, _, reason = DAMAGES[damage]
    found = damaged[damage]
    (rejected,) = found["rejected"]
    assert rejected.startswith(f"{LAST}: ")
    assert file in rejected
    assert reason in rejected
    assert found["iteration"] == 3
    assert found["version"] == 6
    assert found["loaded_third"]


def test_resume_never_refuses_a_directory_with_checkpoints(damaged):
    assert "run.resume is never" in damaged["never"]


def test_all_ranks_stop_where_no_checkpoint_is_good(damaged):
    for error in damaged["all bad"]:
        assert error.startswith("RunError: ")
        assert "no usable checkpoint" in error


def test_a_checkpoint_that_would_run_code_is_refused(damaged, runs):
    """Its manifest is in order; Megatron-Core would open the pickle."""
    for error in damaged["hostile"]:
        assert error.startswith("InputError: ")
        assert "posix.mkdir, which has no place there" in error
    assert not (runs.folder / "ran").exists()


class Hostile:
    """A pickle of it makes a directory when it is read."""

    def __init__(self, mark: Path) -> None:
        self.mark = str(mark)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.mark,)


def make_hostile(checkpoint: Path, mark: Path) -> None:
    content = pickle.dumps(Hostile(mark))
    (checkpoint / "policy" / ".metadata").write_bytes(content)
    manifest = json.loads((checkpoint / "MANIFEST.json").read_text())
    digest = hashlib.sha256(content).hexdigest()
    manifest["files"]["policy/.metadata"] = [len(content), digest]
    (checkpoint / "MANIFEST.json").write_text(json.dumps(manifest))


# -- export --------------------------------------------------------------------------------------

EXPORTS = [
    (model, name, files)
    for model in ("qwen2", "qwen2_tied")
    for name in ("TP2", "PP2")
    for files in ("one", "several")
]


@pytest.fixture(scope="module")
def exports(runs):
    """(model, layout) -> folder with the exports "one" and "several", and logprobs.pt."""
    done: dict[tuple[str, str], Path] = {}

    def export(model: str, layout: str) -> Path:
        if (model, layout) not in done:
            folder = runs.folder / f"export {model} {layout}"
            sizes = (2, 1) if layout == "TP2" else (1, 2)
            args = (runs.folder / "models" / model, folder, *sizes)
            run_on_ranks(2, export_on_ranks, *args)
            done[model, layout] = folder
        return done[model, layout]

    return export


@pytest.mark.parametrize(("model", "layout", "files"), EXPORTS)
def test_transformers_reads_the_export_as_the_policy(runs, exports, model, layout, files):
    from transformers import AutoModelForCausalLM

    folder = exports(model, layout)
    loaded, info = AutoModelForCausalLM.from_pretrained(
        folder / files, output_loading_info=True, local_files_only=True
    )
    assert not any(info[f"{kind}_keys"] for kind in ("missing", "unexpected", "mismatched")), info
    assert loaded.dtype == torch.float32
    start = AutoModelForCausalLM.from_pretrained(runs.folder / "models" / model)
    moved = 0.0
    measured = torch.load(folder / "logprobs.pt")
    assert len(measured) == 12
    for prompt, response, logprobs in measured:
        expected = hf_logprobs(loaded, prompt, response)
        torch.testing.assert_close(logprobs.float(), expected, atol=1e-4, rtol=0)
        moved = max(moved, (expected - hf_logprobs(start, prompt, response)).abs().max().item())
    assert moved > 1e-2  # the export of untrained weights would not pass


@pytest.mark.parametrize(("model", "layout", "files"), EXPORTS)
def test_the_files_are_those_that_transformers_would_write(exports, model, layout, files):
    from safetensors import safe_open

    folder = exports(model, layout) / files
    weights = sorted(path.name for path in folder.glob("*.safetensors"))
    index = folder / "model.safetensors.index.json"
    if files == "one":
        assert weights == ["model.safetensors"]
        assert not index.exists()
        return
    assert len(weights) > 4
    held = {}
    for name in weights:
        with safe_open(folder / name, "pt") as tensors:
            assert not set(tensors.keys()) & set(held)
            held |= dict.fromkeys(tensors.keys(), name)
    assert json.loads(index.read_text())["weight_map"] == held
    assert ("lm_head.weight" in held) == (model == "qwen2")


def test_the_exported_tokenizer_is_the_models_own(runs, exports):
    from transformers import AutoTokenizer

    text = "17+5+4?17+5=22,22+4=26\\boxed{26}"
    exported, source = (
        AutoTokenizer.from_pretrained(folder).encode(text)
        for folder in (exports("qwen2", "TP2") / "one", runs.folder / "models" / "qwen2")
    )
    assert exported == source
    assert len(exported) > 10


@torch.no_grad()
def hf_logprobs(model: Any, prompt: torch.Tensor, response: torch.Tensor) -> torch.Tensor:
    tokens = torch.cat([prompt, response])
    logits = model(tokens[None]).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(-1, response[:, None])[:, 0]


def test_every_checkpoint_carries_its_export(runs, straight_tp2):
    checkpoints = runs.folder / straight_tp2 / "checkpoints"
    sixth, third = (checkpoints / name / "hf" for name in (LAST, "iteration_000003"))
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        exported_at_the_end = runs.folder / straight_tp2 / "hf" / name
        assert (sixth / name).read_bytes() == exported_at_the_end.read_bytes()
    weights = [(path / "model.safetensors").read_bytes() for path in (third, sixth)]
    assert weights[0] != weights[1]
    assert f"{sixth.name}/model.safetensors" in runs.files(straight_tp2)


def test_a_run_starts_from_a_checkpoint_as_from_its_export(runs, straight_tp2):
    """Saved at TP2, started at PP2, under the name of the folder, which means the newest."""
    checkpoints = runs.folder / straight_tp2 / "checkpoints"
    starts = {"from checkpoint": checkpoints, "from export": checkpoints / LAST / "hf"}
    for name, path in starts.items():
        said = runs.finish(name, 2, *PP2, f"model.path={path}", "run.num_iterations=1")
        assert "resumed" not in said
    one, other = (runs.records(name) for name in starts)
    assert one == other
    assert len(one) == 1
    assert exported(runs.folder / "from checkpoint") == exported(runs.folder / "from export")
    # Six iterations of training show.
    assert one[0]["policy/loss"] < 0.9 * runs.records(straight_tp2)[0]["policy/loss"]


# -- on the ranks --------------------------------------------------------------------------------


def build(model_dir: Path, output_dir: Path, tp: int, pp: int) -> Any:
    import preload_megatron  # noqa: F401
    import torch.distributed as dist

    from megatron_rl.build import build_run
    from megatron_rl.config import RunConfig
    from megatron_rl.platforms.base import detect
    from megatron_rl.preflight import read_inputs

    recipe = recipe_of(model_dir, output_dir)
    recipe["parallel"] = {"tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp}
    config = RunConfig.model_validate(recipe)
    inputs = read_inputs(config, dist.get_world_size())
    return build_run(config, inputs, detect(), say=lambda line: None)


def load_damaged(folder: Path, straight: str, out: Path) -> None:
    import torch.distributed as dist

    from megatron_rl.checkpoint.store import CheckpointStore
    from megatron_rl.errors import InputError, RunError

    run = build(folder / "models" / "qwen2", folder / straight, 2, 1)
    source, is_main = folder / straight / "checkpoints", dist.get_rank() == 0

    def store(name: str) -> tuple[Path, CheckpointStore]:
        directory = folder / "loads" / name
        if is_main:
            shutil.copytree(source, directory)
        dist.barrier()
        return directory, CheckpointStore(directory, run.groups, keep_last=2)

    def change(work: Any) -> None:
        if is_main:
            work()
        dist.barrier()

    run.store.load(run.models)
    sixth = run.policy.snapshot()
    directory, only_third = store("only third")
    change(lambda: shutil.rmtree(directory / LAST))
    only_third.load(run.models)
    third = run.policy.snapshot()
    assert not equal(third, sixth)
    found: dict[str, Any] = {}
    for damage, (file, harm, _) in DAMAGES.items():
        run.store.load(run.models)
        assert equal(run.policy.snapshot(), sixth)
        directory, checkpoints = store(damage)
        change(lambda path=directory / LAST / file, harm=harm: harm(path))
        state = checkpoints.load(run.models)
        found[damage] = {
            "rejected": state["rejected"],
            "iteration": state["iteration"],
            "version": run.policy.version,
            "loaded_third": equal(run.policy.snapshot(), third),
        }
    change(lambda: (directory / "iteration_000003" / "MANIFEST.json").unlink())
    found["all bad"] = everywhere(error_of(lambda: checkpoints.load(run.models), RunError))
    directory, checkpoints = store("hostile")
    change(lambda: make_hostile(directory / LAST, folder / "ran"))
    found["hostile"] = everywhere(error_of(lambda: checkpoints.load(run.models), InputError))
    never = run.config.run.model_copy(update={"resume": "never"})
    run.config = run.config.model_copy(update={"run": never})
    found["never"] = error_of(run.resume, InputError)
    if is_main:
        out.write_text(json.dumps(found))


def export_on_ranks(model_dir: Path, folder: Path, tp: int, pp: int) -> None:
    import torch.distributed as dist

    import megatron_rl.weights.export as export_module
    from megatron_rl.loop import run_iteration
    from megatron_rl.types import Sample

    run = build(model_dir, folder, tp, pp)
    for iteration in (1, 2):
        run_iteration(run, iteration)
    samples = [
        Sample(
            group_id=prompt.group_id,
            index=0,
            update=0,
            prompt_tokens=prompt.tokens,
            response_tokens=prompt.gold_tokens,
            advantage=0.0,
        )
        for prompt in run.prompts.next_batch()
    ]
    rows = run.packer.pack_for_measuring(samples if dist.get_rank() == 0 else [])
    measured = [
        (sample.prompt_tokens, sample.response_tokens, own[at : at + len(sample.response_tokens)])
        for batch, own in zip(rows, run.policy.logprobs(rows) or [], strict=False)
        for sample, at in zip(batch.samples, batch.first_loss_rows, strict=True)
    ]
    stock, limit_of = export_module.plan_files, {"one": 1 << 30, "several": 100_000}
    for name, limit in limit_of.items():  # the second export replaces the first
        export_module.plan_files = lambda nbytes, _, limit=limit: stock(nbytes, limit)
        output = run.export()
        if dist.get_rank() == 0:
            shutil.copytree(output, folder / name)
        dist.barrier()
    if run.groups.is_first_copy:
        torch.save(measured, folder / "logprobs.pt")


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(everywhere(all(torch.equal(one[name], other[name]) for name in one)))


def everywhere(item: Any) -> list[Any]:
    import torch.distributed as dist

    items = [None] * dist.get_world_size()
    dist.all_gather_object(items, item)
    return items


def error_of(work: Any, kind: type[Exception]) -> str:
    try:
        work()
    except kind as error:
        return f"{type(error).__name__}: {error}"
    raise AssertionError("no error")
