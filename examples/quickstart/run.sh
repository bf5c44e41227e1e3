#!/usr/bin/env bash
# A small language model learns arithmetic: warm-up by supervised fine-tuning, then Reinforce-Rej,
# through the same program that runs on a cluster. Minutes on two CPU cores.
#
#   OUTPUT=DIR     where everything goes (default: runs/quickstart)
#   RANKS=N        training ranks of the reinforcement-learning run (default: 2, as TP 2)
set -euo pipefail
cd "$(dirname "$0")/../.."

python=${PYTHON:-.venv/bin/python}
output=${OUTPUT:-runs/quickstart}
ranks=${RANKS:-2}
here=examples/quickstart
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
started=$SECONDS

step() { printf '\n== %s (%d s)\n' "$1" $((SECONDS - started)); }
launch() { "$python" -m torch.distributed.run --standalone --nproc-per-node "$@"; }

rm -rf "$output"
mkdir -p "$output"

step "1/3 a tiny Qwen2 model and its SentencePiece tokenizer, from the shipped problems"
"$python" "$here/make_model.py" --output "$output/model"

step "2/3 warm-up: supervised fine-tuning through the trainer (preset sft), data-parallel"
launch "$ranks" -m megatron_rl train "$here/sft.yaml" \
  model.path="$output/model" run.output_dir="$output/sft"

step "3/3 reinforcement learning: Reinforce-Rej, tensor-parallel, evaluated before and after"
launch "$ranks" -m megatron_rl train "$here/reinforce_rej.yaml" \
  model.path="$output/sft/hf" run.output_dir="$output/rl" "parallel.tensor_model_parallel_size=$ranks"

step "done"
"$python" -m megatron_rl show "$output/rl" > /dev/null
"$python" "$here/summary.py" "$output"
