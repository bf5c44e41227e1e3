"""Reinforcement learning of language models: stock Megatron-Core and stock vLLM in one job."""

import os

# torch asks when it allocates for the first time. A CPU's large tensors are fresh memory every time,
# and to get that by pages of 4 KiB takes up to eight times as long as to write to it.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
