"""What a run reads, in lines for a person: the data, what is left out, the first prompt."""

import shlex
from collections.abc import Iterator, Mapping, Sequence

from megatron_rl.config import RunConfig
from megatron_rl.evaluation.benchmark import Benchmark
from megatron_rl.prompts.dataset import PREPARED, PromptReport, PromptStream
from megatron_rl.prompts.overlap import NUM_SHOWN, overlaps
from megatron_rl.prompts.rows import preview
from megatron_rl.prompts.tokenizer import Tokenizer
from megatron_rl.reward.trial import hopeless_golds

SIGNS = {"box": "boxed", "answer_tag": "<answer>", "answer_line": "Answer:"}
"""reward.answer_in -> what a prompt says that asks for an answer there."""

# Kinds of reward that read an answer; a user's function may look for anything.
_READ_ANSWERS = ("math", "exact", "number", "format")


def input_lines(
    config: RunConfig,
    tokenizer: Tokenizer,
    prompts: PromptStream,
    benchmarks: Mapping[str, Benchmark],
) -> list[str]:
    """The lines, in the order in which a person asks: what was read, what not, how it looks."""
    return [
        *_data(prompts.report),
        *_of_benchmarks(config, prompts, benchmarks),
        *_first(config, tokenizer, prompts),
    ]


def evaluation_lines(
    config: RunConfig,
    tokenizer: Tokenizer,
    prompts: PromptStream,
    benchmarks: Mapping[str, Benchmark],
) -> list[str]:
    """The same lines of an evaluation, whose prompts are those of its benchmarks."""
    return [
        *_of_benchmarks(config, prompts, benchmarks),
        *_first(config, tokenizer, next(iter(benchmarks.values())).data),
    ]


def _of_benchmarks(
    config: RunConfig, trained_on: PromptStream, benchmarks: Mapping[str, Benchmark]
) -> Iterator[str]:
    for name, benchmark in benchmarks.items():
        report = benchmark.data.report
        (layout, files), *others = report.layouts.items()
        more = sum(map(len, [files[1:], *(others for _, others in others)]))
        yield (
            f"benchmark {name}: {len(benchmark.questions)} of {report.num_read} rows, "
            f"layout: {layout}, {files[0]}" + (f" and {more} more" if more else "")
        )
        yield from (f"  {note}" for note in report.notes)
    questions = {name: benchmark.questions for name, benchmark in benchmarks.items()}
    commands = {
        name: _leaving_out(config, config.evaluation.benchmarks[name].path) for name in benchmarks
    }
    yield from overlaps(trained_on.questions, questions, commands)
    yield from _unmatched(config, benchmarks)


def _leaving_out(config: RunConfig, benchmark: str) -> str:
    """The command that makes a file of the prompts without those of a benchmark."""
    sets = ("--dataset", *config.prompts.paths, "--held-out", benchmark)
    return shlex.join(["megatron-rl", "prepare", *sets, *PREPARED])


def _first(config: RunConfig, tokenizer: Tokenizer, prompts: PromptStream) -> Iterator[str]:
    """The first prompt, what the chat template puts around it, and what it does not ask for."""
    yield from prompts.shown_first(tokenizer)
    if tokenizer.untold_bos is not None and config.prompts.add_bos:
        yield (
            f"  no {tokenizer.untold_bos} stands in front: tokenizer.model alone does not tell "
            "whether the model was trained with it, as tokenizer_config.json beside it would"
        )
    yield from _around(prompts.report)
    yield from _unasked(config, prompts.first_text(tokenizer))


def _data(report: PromptReport) -> Iterator[str]:
    for layout, files in report.layouts.items():
        more = f" and {len(files) - 1} more" if len(files) > 1 else ""
        yield f"layout: {layout}, {files[0]}{more}"
    yield from report.notes
    yield f"prompts: {report.num_used} of {report.num_read} rows" + (
        f", {report.num_overlong} too long and left out" if report.num_overlong else ""
    )
    for reason, left in report.left_out.items():
        yield f"  {left.count} left out: {reason}, such as {'; '.join(left.examples)}"
    yield from _counted(report.num_unusable, "skipped, since they cannot be used", report.unusable)
    yield from _counted(
        report.num_hopeless,
        "left out, since no response could be right by their answers",
        [f"  {row}" for row in report.hopeless_rows],
    )
    if report.num_conflicting:
        yield f"  {report.num_conflicting} have the prompt of an earlier row and another answer"


def _unmatched(config: RunConfig, benchmarks: Mapping[str, Benchmark]) -> Iterator[str]:
    """A line for each benchmark with answers by which no response could be right."""
    for name, benchmark in benchmarks.items():
        prompts = benchmark.questions
        problems = hopeless_golds([prompt.answer for prompt in prompts], config.reward)
        found = [prompt for prompt in prompts if prompt.answer in problems]
        if found:
            shown = [
                f"row {prompt.group_id + 1}: {preview(prompt.answer)}: {problems[prompt.answer]}"
                for prompt in found[:NUM_SHOWN]
            ]
            yield (
                f"benchmark {name}: by {len(found)} of {len(prompts)} answers no response could be "
                f"right, so these count as wrong: {'; '.join(shown)}"
            )


def _counted(count: int, what: str, examples: Sequence[str]) -> Iterator[str]:
    if count:
        yield f"  {count} {what}:"
        yield from (f"  {example}" for example in examples)


def _around(report: PromptReport) -> Iterator[str]:
    if report.num_own_system:
        yield f"  {report.num_own_system} chats keep the system turn of their row"
    if report.own_system:
        yield (
            f"  the chat template writes a system turn of its own, {report.own_system!r}, where "
            "there is none; prompts.default_system=false leaves it empty"
        )


def _unasked(config: RunConfig, first_prompt: str) -> Iterator[str]:
    """A line where the first prompt does not ask for an answer in the form that is looked for."""
    sign = SIGNS.get(config.reward.answer_in)
    if config.is_supervised or sign is None or config.reward.kind not in _READ_ANSWERS:
        return
    if sign not in first_prompt:
        yield (
            f"  it does not say {sign!r}, and reward.answer_in={config.reward.answer_in} looks for "
            "the answer there: a model that does not know is never right. Ask for it with "
            "prompts.template or prompts.instruction"
        )
