"""What the model reads of a question: the recipe's template, else the chat template, else it."""

from collections.abc import Callable

from megatron_rl.prompts.config import PromptsConfig
from megatron_rl.prompts.tokenizer import Tokenizer

Render = Callable[[str], str]

# Both texts as the public code of arXiv:2504.11343 (RLHFlow/Minimal-RL) gives them to every model.
MATH_SYSTEM = r"Please reason step by step, and put your final answer within \boxed{}."
MATH_INSTRUCTION = r"Let's think step by step and output the final answer within \boxed{}."


def for_mathematics(config: PromptsConfig) -> PromptsConfig:
    """The config with the paper's texts where the recipe leaves them open."""
    if config.template is not None:
        return config
    system = MATH_SYSTEM if config.system is None else config.system
    instruction = MATH_INSTRUCTION if config.instruction is None else config.instruction
    return config.model_copy(update={"system": system, "instruction": instruction})


def choose_template(config: PromptsConfig, tokenizer: Tokenizer) -> Render:
    """The function from a row's prompt to the text that is encoded."""
    template, system, instruction = config.template, config.system or "", config.instruction
    if template is not None:
        return lambda prompt: template.format(prompt=prompt)
    if tokenizer.has_chat_template:
        suffix = f" {instruction}" if instruction else ""
        return lambda prompt: tokenizer.render_chat(prompt + suffix, system)
    return lambda prompt: prompt
