# syntax=docker/dockerfile:1
# Not yet run on a GPU, and not yet built as an image; docs/installation.md tells which of its steps
# were run, and where.
#
#   docker build -t megatron-rl .
#   docker run --gpus all --ipc host --stop-timeout 60 -v "$PWD/runs:/workspace/runs" \
#       megatron-rl train recipe.yaml
#
# A tag can be moved to other bytes, a digest cannot. Pin both bases with what this prints for each:
#   docker buildx imagetools inspect nvidia/cuda:13.0.2-base-ubuntu24.04 --format '{{.Manifest.Digest}}'
#   docker build --build-arg RUNTIME_BASE=nvidia/cuda@sha256:... --build-arg DEVEL_BASE=... .
ARG DEVEL_BASE=nvidia/cuda:13.0.2-cudnn-devel-ubuntu24.04
ARG RUNTIME_BASE=nvidia/cuda:13.0.2-base-ubuntu24.04

# Stage 1, with compilers and headers: Transformer Engine and our csrc are compiled here.
FROM ${DEVEL_BASE} AS build

# Python 3.12 is Ubuntu 24.04's own
RUN apt-get update \
    && apt-get install -y --no-install-recommends git python3-dev python3-pip python3-venv \
    && rm -rf /var/lib/apt/lists/*

ENV VIRTUAL_ENV=/opt/megatron_rl \
    PATH=/opt/megatron_rl/bin:$PATH \
    PIP_NO_CACHE_DIR=1
RUN python3 -m venv "$VIRTUAL_ENV"

# requirements before sources: a change of code does not install 10 GB again
WORKDIR /workspace
COPY requirements requirements
RUN pip install --require-hashes --no-deps -r requirements/cuda.txt
# 9.0 is Hopper (H100, H200); add others, separated by ";". No Apex: Megatron-Core takes Transformer
# Engine's fused Adam before Apex's.
RUN NVTE_FRAMEWORK=pytorch NVTE_PYTORCH_FORCE_BUILD=TRUE NVTE_CUDA_ARCHS=90 \
    TORCH_CUDA_ARCH_LIST=9.0 MAX_JOBS=8 \
    pip install --no-build-isolation --require-hashes --no-deps \
        -r requirements/transformer-engine.txt

COPY pyproject.toml setup.py LICENSE ./
COPY megatron_rl megatron_rl
COPY csrc csrc
RUN MEGATRON_RL_CSRC=cuda MEGATRON_RL_CUDA_ARCHS=90 MAX_JOBS=8 \
    pip install --no-deps --no-build-isolation -e .

# Stage 2, which runs. CUDA's libraries are the wheels'. Triton compiles its launchers with a C
# compiler and Python's headers when it is first used; FlashInfer and DeepGEMM, where vLLM chooses
# them, compile with nvcc and a C++ compiler.
FROM ${RUNTIME_BASE} AS runtime

RUN apt-get update \
    && apt-get install -y --no-install-recommends \
        python3-dev gcc g++ ninja-build cuda-nvcc-13-0 cuda-cudart-dev-13-0 cuda-nvrtc-dev-13-0 \
        libcublas-dev-13-0 libcurand-dev-13-0 \
    && rm -rf /var/lib/apt/lists/*

# Models, prompts and tokenizers are files: nothing is looked for on the network at run time.
ENV VIRTUAL_ENV=/opt/megatron_rl \
    PATH=/opt/megatron_rl/bin:/usr/local/cuda/bin:$PATH \
    CUDA_HOME=/usr/local/cuda \
    PYTHONUNBUFFERED=1 \
    HF_HUB_OFFLINE=1 \
    HF_DATASETS_OFFLINE=1 \
    VLLM_NO_USAGE_STATS=1 \
    DO_NOT_TRACK=1

WORKDIR /workspace
COPY --from=build /opt/megatron_rl /opt/megatron_rl
COPY --from=build /workspace /workspace
COPY tools tools
COPY examples examples

RUN useradd --create-home --uid 10001 trainer \
    && mkdir runs \
    && chown trainer runs
USER trainer

# Beside a run, so on the CPU and without an engine: GPUs are full. `megatron-rl doctor` looks at all.
HEALTHCHECK --start-period=5m --interval=1h --timeout=120s --retries=2 \
    CMD ["env", "MEGATRON_RL_DEVICE=cpu", "OMP_NUM_THREADS=1", "megatron-rl", "doctor", "--deadline", "90", "examples/quickstart/sft.yaml"]

ENTRYPOINT ["python", "-m", "torch.distributed.run", "--nproc-per-node", "gpu", "-m", "megatron_rl"]
CMD ["train", "--help"]
