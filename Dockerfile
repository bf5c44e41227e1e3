# Not yet run on a GPU, and not yet built as an image; docs/installation.md tells which of its steps
# were run, and where.
#
#   docker build -t megatron-rl .
#   docker run --gpus all --ipc host -v "$PWD/runs:/workspace/runs" megatron-rl train recipe.yaml

# devel, not runtime: Transformer Engine and our csrc are compiled here, vLLM compiles at start-up
FROM nvidia/cuda:13.0.2-cudnn-devel-ubuntu24.04

# Python 3.12 is Ubuntu 24.04's own
RUN apt-get update \
    && apt-get install -y --no-install-recommends git python3-dev python3-pip python3-venv \
    && rm -rf /var/lib/apt/lists/*

ENV VIRTUAL_ENV=/opt/megatron_rl \
    PATH=/opt/megatron_rl/bin:$PATH \
    PIP_NO_CACHE_DIR=1 \
    PYTHONUNBUFFERED=1
RUN python3 -m venv "$VIRTUAL_ENV"

# requirements before sources: a change of code does not install 10 GB again
WORKDIR /workspace
COPY requirements requirements
RUN pip install --require-hashes --no-deps -r requirements/cuda.txt
# 9.0 is Hopper (H100, H200); add others, separated by ";"
RUN NVTE_FRAMEWORK=pytorch NVTE_PYTORCH_FORCE_BUILD=TRUE NVTE_CUDA_ARCHS=90 \
    TORCH_CUDA_ARCH_LIST=9.0 MAX_JOBS=8 \
    pip install --no-build-isolation --require-hashes --no-deps \
        -r requirements/transformer-engine.txt

COPY pyproject.toml setup.py LICENSE ./
COPY megatron_rl megatron_rl
COPY csrc csrc
RUN MEGATRON_RL_CSRC=cuda MEGATRON_RL_CUDA_ARCHS=90 MAX_JOBS=8 \
    pip install --no-deps --no-build-isolation -e .
COPY tools tools
COPY examples examples

RUN useradd --create-home --uid 10001 trainer \
    && mkdir runs \
    && chown trainer runs
USER trainer

ENTRYPOINT ["python", "-m", "torch.distributed.run", "--nproc-per-node", "gpu", "-m", "megatron_rl"]
CMD ["train", "--help"]
