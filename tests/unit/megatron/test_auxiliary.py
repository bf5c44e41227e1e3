from megatron_rl.megatron.auxiliary import AuxiliaryLosses, auxiliary_losses


def test_what_a_recipe_asks_for_by_megatrons_names():
    balanced = {"moe_router_load_balancing_type": "seq_aux_loss", "moe_aux_loss_coeff": 0.01}
    assert auxiliary_losses(balanced) == AuxiliaryLosses(
        balanced_over="sequence", balance_coeff=0.01
    )
    both = {**balanced, "moe_router_load_balancing_type": "global_aux_loss", "moe_z_loss_coeff": 2}
    assert auxiliary_losses(both) == AuxiliaryLosses(
        balanced_over="update", balance_coeff=0.01, z_coeff=2.0
    )


def test_without_a_coefficient_there_is_nothing_to_compute():
    nothing = {"moe_router_load_balancing_type": "none", "moe_z_loss_coeff": None}
    for overrides in ({}, nothing, {"moe_aux_loss_coeff": 0.0}):
        assert not auxiliary_losses(overrides)
