"""A question as the model reads it: in the recipe's template, in the chat template, or bare."""

from collections.abc import Callable

from megatron_rl.prompts.config import PromptsConfig
from megatron_rl.prompts.tokenizer import Tokenizer

Render = Callable[[str], str]

# The public code of arXiv:2504.11343 (RLHFlow/Minimal-RL) gives these texts to every model.
MATH_SYSTEM = r"Please reason step by step, and put your final answer within \boxed{}."
MATH_INSTRUCTION = r"Let's think step by step and output the final answer within \boxed{}."


def for_mathematics(config: PromptsConfig) -> PromptsConfig:
    """The config with the paper's texts where the recipe sets none."""
    if config.template is not None:
        return config
    system = MATH_SYSTEM if config.system is None else config.system
    instruction = MATH_INSTRUCTION if config.instruction is None else config.instruction
    return config.model_copy(update={"system": system, "instruction": instruction})


def choose_template(config: PromptsConfig, tokenizer: Tokenizer) -> Render:
    """The function that turns a row's prompt into the text that is encoded."""
    template, system, instruction = config.template, config.system or "", config.instruction
    if template is not None:
        return lambda prompt: template.format(prompt=prompt)
    if tokenizer.has_chat_template:
        suffix = f" {instruction}" if instruction else ""
        return lambda prompt: tokenizer.render_chat(prompt + suffix, system)
    return lambda prompt: prompt
