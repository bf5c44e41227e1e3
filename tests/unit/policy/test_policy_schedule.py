from megatron_rl.megatron.config import OptimizerConfig
from megatron_rl.policy.schedule import schedule_notes


def notes(*, run_updates=24, taken=0, former=None, **settings):
    optimizer = OptimizerConfig(lr=1e-3, **settings)
    return list(schedule_notes(optimizer, run_updates=run_updates, taken=taken, former=former))


def state(style, end):
    """The part of Megatron's schedule that is asked for."""
    return {"lr_decay_style": style, "lr_decay_steps": end}


def test_an_ordinary_schedule_needs_no_word():
    assert notes() == []
    assert notes(lr_warmup_updates=24, lr_schedule="cosine") == []
    assert notes(taken=12, lr_schedule="linear", former=state("linear", 24)) == []
    assert notes(taken=24, lr_schedule="linear", former=state("linear", 24)) == []  # all is done


def test_a_warm_up_longer_than_the_run():
    (line,) = notes(lr_warmup_updates=25)
    assert line == (
        "optimizer.lr_warmup_updates=25: the run has at most 24 updates, so the learning rate "
        "never gets to optimizer.lr=0.001. Lower it"
    )


def test_a_warm_up_longer_than_its_schedule():
    (line,) = notes(lr_warmup_updates=11, lr_schedule="cosine", lr_decay_updates=10)
    assert "the schedule ends at update 10, so the warm-up is cut to 10" in line
    assert notes(lr_warmup_updates=11, lr_schedule="constant", lr_decay_updates=10) == []


def test_a_schedule_that_has_ended_before_this_start():
    ended = {"lr_schedule": "cosine", "min_lr": 1e-5, "former": state("cosine", 13)}
    (line,) = notes(taken=13, lr_decay_updates=13, **ended)
    assert "it ended at update 13, and 13 are taken, so the learning rate stays at " in line
    assert "optimizer.min_lr=1e-05. Raise optimizer.lr_decay_updates" in line
    assert notes(taken=12, lr_decay_updates=13, **ended) == []


def test_a_schedule_that_ends_with_a_run_of_another_length():
    (line,) = notes(taken=6, lr_schedule="linear", former=state("linear", 16))
    assert line == (
        "optimizer.lr_schedule=linear: it ends with the run, at update 24 instead of 16"
    )
    assert notes(taken=6, lr_schedule="linear", former=state("constant", 1 << 60)) == []
