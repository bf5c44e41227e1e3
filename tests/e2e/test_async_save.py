"""Saves that go on while the models are trained: the same files, and errors that are known soon."""

import json
import shutil
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import run_on_ranks
from training_runs import TP2, build, error_of, everywhere, exported

pytestmark = pytest.mark.slow

ASYNC = ("checkpoint.async_save=true",)
LAYOUTS = {"TP2": (2, TP2), "DP2": (2, ())}


@pytest.mark.parametrize("name", LAYOUTS)
def test_files_are_those_of_a_save_that_is_waited_for(runs, name):
    ranks, layout = LAYOUTS[name]
    straight = runs.straight(name, ranks, *layout)
    beside = f"async {name}"
    runs.finish(beside, ranks, *layout, *ASYNC, "checkpoint.save_every=1")
    assert runs.files(beside).keys() == runs.files(straight).keys()
    for file, entry in runs.files(straight).items():
        # The recipe, which says how often is saved, and random states, which differ by process.
        if not file.startswith(("rank_", "state.json")):
            assert runs.files(beside)[file] == entry, file
    assert exported(runs.folder / beside) == exported(runs.folder / straight)
    assert runs.records(beside) == runs.records(straight)


def test_a_run_goes_on_from_it(runs, straight_tp2):
    runs.finish("async stopped", 2, *TP2, *ASYNC, "run.num_iterations=4")
    shutil.rmtree(runs.folder / "async stopped" / "checkpoints" / "iteration_000004")
    said = runs.finish("async stopped", 2, *TP2, *ASYNC)
    assert "resumed after iteration 3" in said
    assert runs.records("async stopped") == runs.records(straight_tp2)
    assert exported(runs.folder / "async stopped") == exported(runs.folder / straight_tp2)


@pytest.fixture(scope="module")
def on_ranks(runs):
    out = runs.folder / "async.json"
    run_on_ranks(2, save_beside_changes, runs.folder, out)
    return json.loads(out.read_text())


def test_what_changes_after_the_copy_is_not_in_the_files(on_ranks):
    """All of it was written after weights, means and schedule had changed."""
    assert on_ranks["weights"] == [True, True]
    assert on_ranks["means"] == [True, True]
    assert on_ranks["export"] == [True, True]


@pytest.mark.parametrize("place", ["_write", "add_to"])
def test_a_failure_is_known_on_all_ranks_by_the_next_look(on_ranks, place):
    """Of a part that all ranks agree on afterwards, and of one that fails alone."""
    own, others = "OSError: a broken disk", "RunError: rank 1 failed: OSError: a broken disk"
    assert on_ranks[place] == [others, own]
    assert on_ranks[f"{place} leaves"] == [["iteration_000001"]] * 2


# -- on the ranks ----------------------------------------------------------------------------------


def save_beside_changes(folder: Path, out: Path) -> None:
    import torch.distributed as dist

    from megatron_rl.checkpoint.store import CheckpointStore

    run = build(folder / "models" / "qwen2", folder / "beside", 2, 1)
    config = run.config.checkpoint.model_copy(update={"async_save": True})
    directory = folder / "beside" / "checkpoints"

    def store() -> CheckpointStore:
        return CheckpointStore(directory, run.groups, config)

    found = {**change_meanwhile(run, store(), directory), **fail(run, store, directory)}
    if dist.get_rank() == 0:
        out.write_text(json.dumps(found))


def save(run: Any, store: Any, iteration: int) -> None:
    store.save(iteration, run.models, {"iteration": iteration}, run._model_files)


def change_meanwhile(run: Any, store: Any, directory: Path) -> dict[str, Any]:
    """Take a step between the copy and the writing, and compare the files with the copied state."""
    from safetensors.torch import load_file

    from megatron_rl.checkpoint.save import Save

    take_a_step(run)
    weights, means = run.policy.snapshot(), means_of(run)
    is_changed, stock = threading.Event(), Save.complete

    def complete_late(self: Save) -> None:
        is_changed.wait()
        stock(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Save, "complete", complete_late)
        save(run, store, 1)
        store.look()  # it has not begun to write
        take_a_step(run)
        assert not all_equal(weights.values(), run.policy.snapshot().values())
        assert not all_equal(means, means_of(run))
        is_changed.set()
        store.finish()
    store.load(run.models)
    whole = directory.parent / "of what was loaded"
    run._model_files.export_to(whole)
    exports = [
        load_file(parent / "hf" / "model.safetensors")
        for parent in (whole, directory / "iteration_000001")
    ]
    return {
        "weights": everywhere(all_equal(weights.values(), run.policy.snapshot().values())),
        "means": everywhere(all_equal(means, means_of(run))),
        "export": everywhere(all_equal(*(export.values() for export in exports))),
    }


def fail(run: Any, store_of: Any, directory: Path) -> dict[str, Any]:
    """What is said where a part of rank 1 fails in the background, and what is left then."""
    import torch.distributed as dist

    from megatron_rl.checkpoint.model_files import ModelFiles
    from megatron_rl.checkpoint.save import Save

    found = {}
    for owner, place in ((Save, "_write"), (ModelFiles, "add_to")):
        store = store_of()
        with pytest.MonkeyPatch.context() as patch:
            if dist.get_rank() == 1:
                patch.setattr(owner, place, breaks)
            save(run, store, 2)
            found[place] = everywhere(error_of(store.finish, Exception))
        names = sorted(path.name for path in directory.iterdir() if path.name[0] != ".")
        found[f"{place} leaves"] = everywhere(names)
    return found


def breaks(*_: Any) -> None:
    raise OSError("a broken disk")


def take_a_step(run: Any) -> None:
    """Change weights, Adam's means, step and schedule, which are all that a checkpoint holds."""
    for chunk in run.policy._trainable:
        for buffer in chunk.buffers:
            buffer.grad_data.fill_(1.0)
    run.policy.step(0.0)


def means_of(run: Any) -> list[torch.Tensor]:
    return tensors_in([one.optimizer.state for one in run.policy.optimizer.chained_optimizers])


def tensors_in(state: Any) -> list[torch.Tensor]:
    """Copies of all tensors of nested state, in order."""
    if isinstance(state, torch.Tensor):
        return [state.clone()]
    if isinstance(state, dict):
        state = list(state.values())
    if isinstance(state, list | tuple):
        return [tensor for part in state for tensor in tensors_in(part)]
    return []


def all_equal(ones: Iterable[torch.Tensor], others: Iterable[torch.Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(ones, others, strict=True))
