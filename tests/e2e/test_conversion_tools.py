"""The tools as a user runs them, and what transformers and vLLM make of their output."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import harness
import pytest
import torch
from engine_models import write_model
from forked import run_command
from safetensors.torch import load_file, save_file
from tiny_models import DELTAS, OF_EXPERTS
from vllm_greedy import NEW_TOKENS, generate

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
MODELS = (
    "qwen2_tied",
    pytest.param("llama3_rope", marks=pytest.mark.exhaustive),
    "glm4_moe",
    "phi4_mini",
    "olmo2",
    "olmo3",
)


ENVIRONMENT = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
ELSEWHERE = Path(sys.executable).parent  # nothing may depend on the working directory


def tool(name: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run as a user does."""
    return subprocess.run(
        [sys.executable, str(ROOT / "tools" / f"{name}.py"), *map(str, arguments)],
        cwd=ELSEWHERE,
        env=os.environ | ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=harness.STUCK_S,
    )


def forked(name: str, *arguments: str | Path) -> tuple[int, str]:
    """Exit code and all that is said, where imports are no part of what is tested."""
    program = ROOT / "tools" / f"{name}.py"
    return run_command([*map(str, arguments)], 1, ELSEWHERE, ENVIRONMENT, program)


def succeeded(model: str, name: str, *arguments: str | Path) -> list[str]:
    """The lines that a tool has said, of one model as a user's."""
    if model == MODELS[0]:
        result = tool(name, *arguments)
        code, said = result.returncode, result.stdout + result.stderr * bool(result.returncode)
    else:
        code, said = forked(name, *arguments)
    assert code == 0, said
    return said.splitlines()


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """Model -> folder with hf/, megatron/ from it, and back/ from that."""
    done: dict[str, Path] = {}

    def convert(model: str) -> Path:
        if model not in done:
            folder = tmp_path_factory.mktemp(model)
            write_model(model, folder / "hf")
            there = succeeded(
                model,
                "convert_hf_to_megatron",
                *("--hf", folder / "hf", "--output", folder / "megatron"),
                *("--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2"),
            )
            assert there[-1] == str(folder / "megatron" / "iter_0000001")
            succeeded(
                model,
                "convert_megatron_to_hf",
                *("--megatron", folder / "megatron", "--output", folder / "back"),
                *("--file-mib", "1"),
            )
            done[model] = folder
        return done[model]

    return convert


# transformers has another epsilon than config.json says in moonlight's norms, which is mended here.
@pytest.mark.parametrize(
    "model",
    [
        *(*MODELS, *DELTAS[:1], *OF_EXPERTS),
        pytest.param("moonlight", marks=pytest.mark.exhaustive),
    ],
)
def test_both_kinds_hold_the_same_weights_and_give_the_same_logits(converted, model):
    folder = converted(model)
    said = succeeded(model, "verify_checkpoint", folder / "hf", folder / "megatron")
    tensors, logits = said[-2:]
    assert "equal bit for bit" in tensors
    assert "the likeliest token differs in 0 of" in logits


@pytest.fixture(scope="module")
def vllm_is_preloaded():
    with harness.preloaded("preload_vllm"):
        yield


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.usefixtures("vllm_is_preloaded")
def test_vllm_and_transformers_continue_alike(converted, tmp_path, model):
    """vLLM with what came back, transformers with the source."""
    from transformers import AutoModelForCausalLM

    folder, out = converted(model), tmp_path / "greedy.pt"
    assert len(list((folder / "back").glob("*.safetensors"))) > 1
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, 60, (5 + n,), generator=generator).tolist() for n in range(4)]
    in_a_vllm_process(folder / "back", prompts, out)
    source = AutoModelForCausalLM.from_pretrained(folder / "hf", dtype=torch.float32)
    back = AutoModelForCausalLM.from_pretrained(folder / "back", dtype=torch.float32)
    for prompt, (ids, logprobs) in zip(prompts, torch.load(out), strict=True):
        assert len(ids) == NEW_TOKENS
        tokens = torch.tensor([prompt + ids])
        with torch.no_grad():
            logits = source(tokens).logits[0, len(prompt) - 1 : -1]
            assert torch.equal(back(tokens).logits[0, len(prompt) - 1 : -1], logits)
        assert logits.argmax(-1).tolist() == ids
        expected = logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0]
        # seen: 1.2e-6; a random model soon repeats one token, so this is the sharper check
        torch.testing.assert_close(torch.tensor(logprobs), expected, atol=1e-5, rtol=0)


def in_a_vllm_process(model_dir: Path, prompts: list[list[int]], out: Path) -> None:
    with harness.our_path_for_the_server():
        process = harness.server().Process(target=generate, args=(model_dir, prompts, out))
        process.start()
    process.join(harness.STUCK_S)
    process.kill()
    assert process.exitcode == 0


def test_the_first_difference_is_named(converted, tmp_path):
    folder = converted("qwen2_tied")
    other = shutil.copytree(folder / "hf", tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    for name in ("model.layers.2.mlp.up_proj.weight", "model.layers.1.self_attn.k_proj.bias"):
        tensors[name].view(-1)[5] += 0.25
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    verified = tool("verify_checkpoint", folder / "megatron", other)  # its lines, and no others
    assert verified.returncode == 1, verified.stderr
    found, first, logits = verified.stdout.splitlines()
    assert f"2 of {len(tensors)} differ, by up to 0.25" in found
    assert "first: model.layers.1.self_attn.k_proj.bias[5] is " in first
    assert float(re.search(r"differ by up to (\S+),", logits)[1]) > 1e-2
    code, said = forked(
        "verify_checkpoint", "--skip-logits", "--tolerance", "0.3", folder / "megatron", other
    )
    assert code == 0, said


def test_mistakes_are_one_line_and_a_code(converted, tmp_path):
    folder = converted("qwen2_tied")
    into = ("--output", tmp_path / "out")
    for arguments, said in (
        (("--hf", tmp_path / "nowhere", *into), "--hf=.*nowhere.*: there is no such directory"),
        (("--hf", tmp_path, *into), "it has no config.json"),
        (("--hf", folder / "megatron", *into), "it is a Megatron-Core checkpoint already"),
        (
            ("--hf", folder / "hf", *into, "--tensor-model-parallel-size", "3"),
            "tensor_model_parallel_size=3: must divide the model's 4 attention heads",
        ),
        (
            ("--hf", folder / "hf", "--output", folder / "megatron"),
            "it holds Megatron-Core checkpoints",
        ),
    ):
        refused(forked("convert_hf_to_megatron", *arguments), said)
    refused(
        forked("convert_megatron_to_hf", "--megatron", folder / "hf", *into),
        "no Megatron-Core checkpoint is there",
    )
    refused(
        forked("verify_checkpoint", folder / "hf", tmp_path / "nowhere"),
        "B=.*nowhere.*: there is no such directory",
    )
    assert not (tmp_path / "out").exists()


def refused(ended: tuple[int, str], expected: str) -> None:
    code, said = ended
    assert code == 2, said
    assert re.search(expected, said), said
    assert "Traceback" not in said
