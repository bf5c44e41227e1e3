"""A run that was interrupted ends where it would have ended."""

import hashlib
import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import run_on_ranks
from safetensors.torch import load_file
from training_runs import LAST, PP2, TP2, build, error_of, everywhere, exported

from megatron_rl.checkpoint.manifest import write_manifest

pytestmark = pytest.mark.slow

EP2 = ("parallel.expert_model_parallel_size=2",)
LAYOUTS = {"one rank": (1, ()), "TP2": (2, TP2)}
WEIGHTS_IN = "policy/__"  # files that hold tensors, of weights and optimizer


@pytest.fixture(scope="module", params=LAYOUTS)
def interrupted(runs, request):
    """A run straight to its end, and one that was lost after four iterations and went on."""
    ranks, layout = LAYOUTS[request.param]
    straight, stopped = runs.straight(request.param, ranks, *layout), f"stopped {request.param}"
    runs.finish(stopped, ranks, *layout, "run.num_iterations=4")
    assert [record["iteration"] for record in runs.records(stopped)] == [1, 2, 3, 4]
    shutil.rmtree(runs.folder / stopped / "checkpoints" / "iteration_000004")  # as a kill has it
    said = runs.finish(stopped, ranks, *layout)
    return straight, stopped, said


def test_resumed_weights_and_optimizer_are_bit_equal(runs, interrupted):
    straight, stopped, said = interrupted
    assert "resumed after iteration 3" in said
    expected, found = runs.files(straight), runs.files(stopped)
    ranks, _ = LAYOUTS[straight.removeprefix("straight ")]
    names = [name for name in expected if name.startswith(WEIGHTS_IN)]
    writers = {name.removeprefix(WEIGHTS_IN).partition("_")[0] for name in names}
    assert writers == {str(rank) for rank in range(ranks)}  # the comparison is of every rank's
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


def test_another_layout_continues_with_the_same_loss(runs, straight_tp2):
    output = runs.copy(straight_tp2, "TP2 to PP2")
    shutil.rmtree(output / "checkpoints" / LAST)
    said = runs.finish("TP2 to PP2", 2, *PP2)
    assert "resumed after iteration 3" in said
    check_continuation(runs.records(straight_tp2), runs.records("TP2 to PP2"))


def test_biases_of_routers_stay_what_they_were_to_the_last_bit(runs):
    """They are float32 in a model of bfloat16: in the export, and in the checkpoint behind it."""
    model = runs.folder / "models" / "glm4_moe"
    settings = (f"model.path={model}", "model.dtype=bfloat16", *EP2)
    for end in (1, 2):
        runs.finish("biases", 2, *settings, f"run.num_iterations={end}")
        exported, original = (load_tensors(d) for d in (runs.folder / "biases" / "hf", model))
        names = [name for name in original if name.endswith("e_score_correction_bias")]
        assert len(names) == 3
        for name in names:
            assert exported[name].dtype == torch.float32
            assert torch.equal(exported[name], original[name])
        head = exported["lm_head.weight"]
        assert head.dtype == torch.bfloat16
        assert not torch.equal(head, original["lm_head.weight"].bfloat16())


def load_tensors(directory):
    files = sorted(directory.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


@pytest.mark.parametrize(
    "model", ["glm4_moe", pytest.param("deepseek_v3", marks=pytest.mark.exhaustive)]
)
def test_experts_continue_at_another_layout(runs, model):
    """With expert parallelism Megatron has two optimizers, and without it one: there and back.

    Between, stages have one layer and three.
    """
    settings = (f"model.path={runs.folder / 'models' / model}", "run.num_iterations=8")
    straight, moved = f"{model} EP2", f"{model} EP2 to PP2 to EP2"
    runs.finish(straight, 2, *settings, *EP2, "checkpoint.keep_last=3")
    copied = runs.copy(straight, moved) / "checkpoints"
    for name in (LAST, "iteration_000008"):
        shutil.rmtree(copied / name)
    uneven = (*PP2, "parallel.num_layers_in_first_pipeline_stage=1")
    for layout, start, end in ((uneven, 3, 6), (EP2, 6, 8)):
        changed = (*settings, *layout, f"run.num_iterations={end}")
        said = runs.finish(moved, 2, *changed)
        assert f"resumed after iteration {start}" in said
    check_continuation(runs.records(straight), runs.records(moved))


def check_continuation(
    expected: list[dict[str, Any]], found: list[dict[str, Any]], bound: float = 1e-6
) -> None:
    assert found[:3] == expected[:3]
    assert len(found) == len(expected) >= 6
    for there, here in zip(expected[3:], found[3:], strict=True):
        for name in ("policy/loss", "policy/grad_norm", "policy/entropy_mean"):
            # float32 sums in another order
            assert here[name] == pytest.approx(there[name], rel=bound), name
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
    shutil.rmtree(output / "starts" / "001")  # of this start; nothing else may be new
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
    "cut off": ("policy/__1_0.distcp", cut, "bytes instead of"),
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
    listed = json.loads((checkpoint / "MANIFEST.json").read_text())
    digest = hashlib.sha256(content).hexdigest()
    files = listed["files"] | {"policy/.metadata": (len(content), digest)}
    write_manifest(checkpoint, listed["iteration"], listed["world_size"], files)


# -- on the ranks ----------------------------------------------------------------------------------


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
        return directory, CheckpointStore(directory, run.groups, run.config.checkpoint)

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


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(everywhere(all(torch.equal(one[name], other[name]) for name in one)))
