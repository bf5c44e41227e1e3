#!/usr/bin/env bash
# Every method of the paper from the same warm-up, on the quickstart's task, on a CPU; then the
# report. One process per run, JOBS of them at a time.
#
#   OUTPUT=DIR      where everything goes (default: runs/small_scale); finished runs are kept
#   METHODS="a b"   presets to train (default: all below)
#   SEEDS="0 1 2"   seeds of sampling and order
#   JOBS=N          runs at a time (default: number of cores)
set -euo pipefail
cd "$(dirname "$0")/../.."

python=${PYTHON:-.venv/bin/python}
output=${OUTPUT:-runs/small_scale}
methods=${METHODS:-raft raft_pp iterative_dpo reinforce grpo ppo reinforce_remove_all_wrong \
  reinforce_remove_all_correct reinforce_rej reinforce_rej_norm reinforce_mean_zero}
seeds=${SEEDS:-0 1 2}
jobs=${JOBS:-$(nproc)}
here=examples/small_scale
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

if [ ! -d "$output/sft/hf" ]; then
  echo "== the model and its warm-up, shared by all runs"
  "$python" examples/quickstart/make_model.py --output "$output/model"
  "$python" -m megatron_rl train examples/quickstart/sft.yaml \
    model.path="$output/model" run.output_dir="$output/sft" \
    run.num_iterations=1000 prompts.prompts_per_iteration=64  # what small_scale.md was measured with
fi

train() {  # method seed
  local run="$output/$1/seed$2" recipe="$here/base.yaml"
  [ -f "$here/$1.yaml" ] && recipe="$here/$1.yaml"
  [ -f "$run/finished" ] && return
  rm -rf "$run" && mkdir -p "$run"
  "$python" -m megatron_rl train "$recipe" algorithm.preset="$1" run.seed="$2" \
    run.output_dir="$run" model.path="$output/sft/hf" metrics.console=plain > "$run/log.txt" 2>&1 \
    || { echo "$1, seed $2: failed, see $run/log.txt"; return 1; }
  grep -q '^done: ' "$run/log.txt" || { echo "$1, seed $2: stopped"; return 1; }
  touch "$run/finished"
  echo "$1, seed $2: $(grep -c iteration "$run/metrics.jsonl") records"
}
export -f train
export python output here

status=0
for seed in $seeds; do for method in $methods; do echo "$method $seed"; done; done |
  xargs -P "$jobs" -L 1 bash -c 'train "$@"' train || status=1
"$python" "$here/report.py" "$output"
exit $status
