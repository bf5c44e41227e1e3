from megatron_rl.metrics.grace import Grace

ITERATION = {
    "time/rollout_s": 500.0,  # a stop breaks it off
    "time/logprob_s": 4.0,
    "time/update_s": 20.0,
    "time/weight_sync_s": 1.0,
    "time/evaluation_s": 500.0,
    "time/iteration_s": 1025.0,
}


def test_a_stop_that_takes_longer_than_torchrun_waits_is_said_once():
    grace = Grace(30.0)
    assert list(grace.exceeded(ITERATION)) == []  # 25 s
    (line,) = grace.exceeded({**ITERATION, "time/checkpoint_s": 27.0})
    assert line == (
        "a stop would lose its iteration: torchrun kills ranks 30 s after it passes SIGTERM or "
        "Ctrl-C on, and a stop may take 52 s here (training 25 s, checkpoint 27 s). Start it with "
        "`torchrun --shutdown-timeout 120`"
    )
    assert list(grace.exceeded({**ITERATION, "time/update_s": 900.0})) == []


def test_a_checkpoint_of_an_earlier_iteration_counts():
    grace = Grace(30.0)
    assert list(grace.exceeded({"time/checkpoint_s": 27.0})) == []
    (line,) = grace.exceeded({"time/update_s": 4.0})
    assert "may take 31 s here (training 4 s, checkpoint 27 s)" in line


def test_where_nobody_kills_nothing_is_said():
    assert list(Grace(None).exceeded({"time/update_s": 9000.0})) == []
