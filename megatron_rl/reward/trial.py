"""Before a run: functions are called, and golds that take too long to compare are found."""

from collections.abc import Iterable, Sequence

from megatron_rl.reward.checks import is_import_path
from megatron_rl.reward.config import RewardConfig
from megatron_rl.reward.gold import FORMS, check_gold
from megatron_rl.reward.kinds import make_judge
from megatron_rl.reward.scorer import start_pool
from megatron_rl.reward.verifier import Verifier

_PROBE = "7"  # an answer that most golds are told from at once, and towers of powers are not
NUM_TRIED = 4  # answers with which a function is called


def try_functions(config: RewardConfig, answers: Sequence[str]) -> None:
    """Call every function of the section with dummies and with the first of these answers.

    Raises:
        InputError: one of them cannot be used.
    """
    for setting, kind in config.kinds.items():
        if is_import_path(kind):
            pool = start_pool(config, setting, kind, answers[:NUM_TRIED])
            assert pool is not None
            pool.close()


def hopeless_golds(answers: Iterable[str], config: RewardConfig) -> dict[str, str]:
    """Answer -> why no response could be right by it, for those by which none could.

    Among them are those that cannot be compared within reward.deadline_s: a worker has to compare
    each that exact rules leave open.
    """
    distinct = list(dict.fromkeys(answers))
    reasons = {answer: check_gold(answer, config) for answer in distinct}
    hopeless = {answer: reason for answer, reason in reasons.items() if reason is not None}
    usable = [answer for answer in distinct if answer not in hopeless]
    return hopeless | (_too_slow(usable, config) if config.kind == "math" else {})


def _too_slow(answers: Sequence[str], config: RewardConfig) -> dict[str, str]:
    judge, probe = make_judge(config.kind, config), FORMS[config.answer_in] % _PROBE
    assert judge is not None
    left_open = [answer for answer in answers if judge(probe, answer, None).pair is not None]
    if not left_open:
        return {}
    verifier = Verifier(judge, start_pool(config, "reward.kind", config.kind))
    try:
        for answer in left_open:
            verifier.submit(answer, probe, answer, None)
        while verifier.is_busy:
            verifier.advance(1.0)
        results = verifier.take()
    finally:
        verifier.close()
    return {
        answer: f"it cannot be compared within reward.deadline_s={config.deadline_s} "
        f"({result.reason})"
        for answer in left_open
        if (result := results[answer]).has_failed
    }
