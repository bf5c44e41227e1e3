"""This program, TRL and a plain loop take turns on one machine: same model, prompts and updates.

    python -m venv trl && trl/bin/pip install trl
    python benchmarks/compare.py --case tiny --others trl/bin/python

All are started once, one after the other, and then go through their gates in turn, one iteration
each, while the others stand still. Seconds are the conductor's: from the gate's opening to the last
rank's arrival at the next one. Responses have one length (no end counts), rewards are given by the
place in the group and never tie, and the learning rate is so small that everybody samples from the
same policy all the time. A ratio is the median over turns: whatever else loads the machine meets
all of a turn.
"""

import argparse
import itertools
import json
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from gates import Program
from launched import DATA, ROOT, SMOLLM2, make_model
from measure import describe_machine

PHASES = ("rollout", "reward", "logprob", "update", "weight_sync")
HERE = Path(__file__).parent
OURS = {"megatron": "megatron", "vllm": "vllm", "half": "megatron", "copies": "megatron"}
"""Names of this program, and the engine of each; `half` drops every second group, and in `copies`
every response has its own prompt (`batching.share_prompts=false`)."""


OF_OURS = ("half", "copies")  # are compared with the others of this program
PROMPTS = 512  # that are made, where those of the quickstart are too short


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model, and what everybody does with it."""

    prompts: int
    group_size: int = 8
    response_tokens: int = 32
    updates: int = 2
    config: tuple[str, dict[str, Any]] | None = None  # None: the quickstart's model
    ends: bool = False  # whether its responses would end by themselves
    prompt_tokens: tuple[int, int] = (1, 16)  # the most are between these, another for each prompt

    @property
    def responses(self) -> int:
        return self.prompts * self.group_size


CASES = {
    "tiny": Case(prompts=32, ends=True),
    "vocabulary": Case(
        prompts=8,
        config=(
            "Qwen2",
            {
                "vocab_size": 151936,
                "hidden_size": 128,
                "intermediate_size": 352,
                "num_hidden_layers": 6,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
                "max_position_embeddings": 1024,
                "tie_word_embeddings": True,
            },
        ),
    ),
    # The sizes of SmolLM2-135M.
    "smollm2": Case(prompts=4, config=("Llama", SMOLLM2)),
    # Prompts of up to the tokens that examples/real_model allows.
    "problems": Case(prompts=4, config=("Llama", SMOLLM2), prompt_tokens=(48, 96)),
}


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # nobody is left standing
    options = _options()
    case = CASES[options.case]
    folder = Path(tempfile.mkdtemp(prefix="compare-"))
    model = _model(case, folder)
    data = _data(case, model, folder)
    programs: list[Program] = []
    try:
        for name in options.who:
            programs.append(_start(name, case, model, data, folder, options))
            print(f"{name} has started in {programs[-1].start_s:.1f} s", flush=True)
        for _ in range(options.iterations + 1):  # the first one is not counted
            for program in programs:
                program.go()
            told = ", ".join(f"{one.name} {one.seconds[-1]:.2f}" for one in programs)
            print(told, file=sys.stderr, flush=True)
        print("\n".join(_report(programs, case, folder, options)))
    finally:
        for program in programs:
            program.end()
        shutil.rmtree(folder, ignore_errors=True)


def _start(
    name: str, case: Case, model: Path, data: Path, folder: Path, options: argparse.Namespace
) -> Program:
    """name: who, and behind a colon the ranks: `megatron:2`, `vllm:2`, `trl:2`, `loop:2`."""
    who, _, told = name.partition(":")
    ranks = int(told or 1)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    threads = str(max(1, options.cores // ranks))
    environment = {
        "OMP_NUM_THREADS": threads,
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": str(ROOT),
    }
    if who in OURS:
        environment |= {"COMPARE_HALF": "1"} if who == "half" else {}
        recipe = folder / f"{name}.yaml"
        settings = _recipe(OURS[who], case, model, data, folder / name, options)
        settings |= {"batching": {"share_prompts": False}} if who == "copies" else {}
        recipe.write_text(yaml.safe_dump(settings))
        program = [str(HERE / "compare_ours.py"), "train", str(recipe)]
        command = [sys.executable, *(torchrun if ranks > 1 else ()), *program]
    else:
        program = [str(HERE / "compare_others.py"), who]
        for key, value in {
            "model": model,
            "data": data,
            "output": folder / name,
            "prompts": case.prompts,
            "group-size": case.group_size,
            "response-tokens": case.response_tokens,
            "updates": case.updates,
            "iterations": options.iterations + 1,
            "micro": 0,
        }.items():
            program += [f"--{key}", str(value)]
        program += ["--ends"] if case.ends else []
        command = [str(options.others), *(torchrun if ranks > 1 else ()), *program]
    return Program(name, command, ranks=ranks, folder=folder, environment=environment, cwd=ROOT)


def _recipe(
    engine: str, case: Case, model: Path, data: Path, output: Path, options: argparse.Namespace
) -> dict[str, Any]:
    return {
        "run": {"output_dir": str(output), "num_iterations": options.iterations + 1},
        "model": {"path": str(model), "dtype": "float32"},
        "prompts": {
            "path": str(data),
            "prompts_per_iteration": case.prompts,
            "max_prompt_tokens": case.prompt_tokens[1],
        },
        "rollout": {
            "engine": engine,
            "group_size": case.group_size,
            "max_response_tokens": case.response_tokens,
        },
        "reward": {"num_workers": 1},
        "algorithm": {"preset": "grpo", "selection": ["drop_uniform"]},
        "optimizer": {
            "lr": 1e-12,
            "weight_decay": 0.0,
            "prompts_per_update": case.prompts // case.updates,
        },
        "checkpoint": {"save_every": 0, "export_hf": False},
        "metrics": {"console": "plain"},
    }


def _model(case: Case, folder: Path) -> Path:
    """The quickstart's model, or one with random weights and the quickstart's tokenizer."""
    tiny = make_model(folder / "tiny")
    if case.config is None:
        return tiny
    kind, sizes = case.config
    code = (
        "import json, sys, torch, transformers\n"
        "kind, sizes, output = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]\n"
        "torch.manual_seed(0)\n"
        "config = getattr(transformers, f'{kind}Config')(**sizes,\n"
        "    bos_token_id=2, eos_token_id=1, pad_token_id=0, initializer_range=0.05)\n"
        "getattr(transformers, f'{kind}ForCausalLM')(config).float().save_pretrained(output)\n"
    )
    output = folder / "model"
    subprocess.run([sys.executable, "-c", code, kind, json.dumps(sizes), output], check=True)
    for file in tiny.glob("tokenizer*"):
        shutil.copy(file, output)
    return output


def _data(case: Case, model: Path, folder: Path) -> Path:
    """The quickstart's problems, several in a prompt where it is to be longer than one."""
    source = DATA / "train.jsonl"
    if case.prompt_tokens == Case.prompt_tokens:
        return source
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    rows = itertools.cycle(map(json.loads, source.read_text().splitlines()))
    lengths = random.Random(0)
    made = []
    for _ in range(PROMPTS):
        most, text = lengths.randint(*case.prompt_tokens), ""
        for row in rows:
            longer = f"{text} {row['prompt']}".strip()
            if len(tokenizer(longer, add_special_tokens=False)["input_ids"]) > most:
                break
            text = longer
        made.append(json.dumps(row | {"prompt": text}))
    output = folder / "problems.jsonl"
    output.write_text("\n".join(made) + "\n")
    return output


def _report(
    programs: list[Program], case: Case, folder: Path, options: argparse.Namespace
) -> list[str]:
    """Lines of Markdown."""
    versions = subprocess.run(
        [str(options.others), "-c", VERSIONS], capture_output=True, text=True, check=True
    ).stdout.strip()
    head = ("who, ranks", "turns", "iteration, s", "least", "responses a second", *PHASES)
    lines = [
        json.dumps(describe_machine("cpu") | {"versions": versions}),
        f"{case.responses} responses x {case.response_tokens} tokens, {case.updates} updates",
        "",
        "| " + " | ".join((*head, "start, s", "peak MiB a rank")) + " |",
        "|" + "---|" * (len(head) + 2),
    ]
    for program in programs:
        seconds = program.seconds[1:]
        median = statistics.median(seconds)
        phases = _phases(program, folder)
        cells = [
            program.name,
            str(len(seconds)),
            f"{median:.3f}",
            f"{min(seconds):.3f}",
            f"{case.responses / median:.1f}",
            *(f"{phases[name]:.3f}" if phases.get(name) else "-" for name in PHASES),
            f"{program.start_s:.1f}",
            f"{program.peak_mib:,}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    lines.append("")
    compared = [one for one in programs if not _is_ours(one) or one.name.startswith(OF_OURS)]
    for ours in filter(_is_ours, programs):
        for other in compared:
            if other is not ours:
                ratios = [b / a for a, b in zip(ours.seconds[1:], other.seconds[1:], strict=True)]
                told = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
                lines.append(f"{other.name} takes {told} times as long as {ours.name}")
    return lines


def _is_ours(program: Program) -> bool:
    return program.name.partition(":")[0] in OURS


VERSIONS = (
    "from importlib.metadata import version as v\n"
    "print(', '.join(f'{n} {v(n)}' for n in ('trl', 'accelerate', 'transformers', 'torch')))"
)


def _phases(program: Program, folder: Path) -> dict[str, float]:
    """Medians without the first iteration."""
    metrics = folder / program.name / "metrics.jsonl"
    if metrics.exists():
        rows = [json.loads(line) for line in metrics.read_text().splitlines()]
        noted = [{name: row.get(f"time/{name}_s", 0.0) for name in PHASES} for row in rows]
    else:
        noted = program.phases()
    return {name: statistics.median(row.get(name, 0.0) for row in noted[1:]) for name in PHASES}


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", choices=CASES, default="tiny")
    parser.add_argument("--others", type=Path, required=True, help="a Python that has TRL")
    parser.add_argument("--iterations", type=int, default=10)
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument(
        "--who",
        nargs="+",
        default=["megatron:2", "vllm:2", "trl:2", "loop:2"],
        metavar="NAME:RANKS",
        help="megatron, vllm (engines of this program), half (it drops half of it), copies (a "
        "prompt for each response), trl, loop",
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
