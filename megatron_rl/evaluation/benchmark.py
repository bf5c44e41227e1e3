"""A benchmark as it is read: its questions, and what is to be said of its data."""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_rl.evaluation.config import BenchmarkConfig
from megatron_rl.prompts.config import PromptsConfig
from megatron_rl.prompts.dataset import PromptStream
from megatron_rl.prompts.template import Texts
from megatron_rl.prompts.tokenizer import Tokenizer
from megatron_rl.types import Prompt


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """The questions of one benchmark, and the data that they come from."""

    questions: Sequence[Prompt]
    data: PromptStream


def load_benchmark(
    benchmark: BenchmarkConfig, prompts: PromptsConfig, tokenizer: Tokenizer, texts: Texts
) -> Benchmark:
    """One benchmark, through the template of the training prompts."""
    config = prompts.model_copy(
        update={
            "path": benchmark.path,
            "split": benchmark.split,
            "prompt_key": benchmark.prompt_key,
            "answer_key": benchmark.answer_key,
            "shuffle": False,
        }
    )
    stream = PromptStream(config, tokenizer, seed=0, is_benchmark=True, texts=texts)
    return Benchmark(questions=stream.all_prompts()[: benchmark.max_problems], data=stream)
