"""What a run exports is its policy, to transformers and to the next run."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import run_on_ranks
from training_runs import LAST, PP2, build, exported

pytestmark = pytest.mark.slow

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


# -- on the ranks ----------------------------------------------------------------------------------


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
        (sample.prompt_tokens, sample.response_tokens, part)
        for batch, own in zip(rows, run.policy.logprobs(rows) or [], strict=False)
        for sample, part in zip(
            batch.samples, own.split([len(s.response_tokens) for s in batch.samples]), strict=True
        )
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
