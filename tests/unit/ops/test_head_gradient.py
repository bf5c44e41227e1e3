import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_rl.megatron.gradients import MainGrad
from megatron_rl.objectives.likelihood import Likelihood
from megatron_rl.objectives.token_loss import linear_policy_loss
from megatron_rl.ops import head_gradient
from megatron_rl.ops.head import Head, logits_memory
from megatron_rl.ops.head_gradient import add_widened
from megatron_rl.ops.linear_logprobs import linear_logprobs
from megatron_rl.ops.loss_spec import SharedTerms
from megatron_rl.ops.vocab_parallel import Shard
from megatron_rl.types import LossTokens

BLOCK = 1000  # rows of a product, made small so that a small head has several
ROWS, VOCAB, HIDDEN, CHUNK = 20, 3 * BLOCK + 5, 32, 4
SHARD = Shard(tp_group=None, vocab_start=0, valid_vocab=VOCAB, temperature=1.0)
BEFORE = 3.0  # what others have added to main_grad


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(head_gradient, "BLOCK_ELEMENTS", BLOCK * HIDDEN)


class Allocations(TorchDispatchMode):
    """Elements of the largest dense tensor that came into being; within ops of csrc/ none does."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        known = {storage_of(x) for x in tree_leaves((args, kwargs))}
        for result in tree_leaves(results):
            if storage_of(result) not in known:
                self.largest = max(self.largest, result.numel())
        return results


def storage_of(x):
    is_dense = isinstance(x, torch.Tensor) and x.layout == torch.strided
    return x.untyped_storage().data_ptr() if is_dense else None


def problem(dtype, rows=ROWS):
    torch.manual_seed(0)
    hidden = torch.randn(rows, HIDDEN).to(dtype).requires_grad_()
    weight = (torch.randn(VOCAB, HIDDEN) / 6).to(dtype).requires_grad_()
    wide = torch.promote_types(dtype, torch.float32)
    weight.main_grad = torch.full((VOCAB, HIDDEN), BEFORE, dtype=wide)
    weight.grad_added_to_main_grad = False
    targets, weights = torch.randint(0, VOCAB, (rows,)), torch.rand(rows)
    return hidden, weight, targets, weights


def head_of(hidden, weight, *, into_main_grad=True):
    buffer = MainGrad(weight) if into_main_grad else None
    return Head(hidden=hidden, head_weight=weight, shard=SHARD, gradient_buffer=buffer)


def loss_of(hidden, weight, targets, weights, *, into_main_grad=True):
    tokens = LossTokens(
        at=torch.arange(len(weights)),
        targets=targets,
        weights=weights,
        advantages=torch.ones_like(weights),
    )
    head = head_of(hidden, weight, into_main_grad=into_main_grad)
    return linear_policy_loss(head, tokens, Likelihood(), SharedTerms(), chunk_rows=CHUNK).loss


def other_loss_of(hidden, weight, targets, weights):
    logprobs, _ = linear_logprobs(head_of(hidden, weight), targets, chunk_rows=CHUNK)
    return -(weights * logprobs).sum()


def exact_gradients(hidden, weight, targets, weights):
    """Of hidden and weight, in float64, by plain torch."""
    leaves = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    logprobs = (leaves[0] @ leaves[1].T).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    (-(weights * logprobs).sum()).backward()
    return [leaf.grad for leaf in leaves]


@pytest.mark.parametrize("loss", [loss_of, other_loss_of])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    # bfloat16: logits near 10 are off by 2^-6, so their gradients by 1 %
    [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)],
)
def test_two_losses_add_their_gradients_to_main_grad(loss, dtype, tolerance):
    inputs = problem(dtype)
    hidden, weight = inputs[:2]
    expected = exact_gradients(*inputs)
    for _ in range(2):
        hidden.grad = weight.grad = None
        loss(*inputs).backward()
        assert weight.grad_added_to_main_grad
        assert weight.grad.is_sparse
        assert weight.grad._nnz() == 0  # DDP's hook has nothing to add, even if it did
    added = (weight.main_grad - BEFORE).double() / 2
    for actual, exact in ((hidden.grad.double(), expected[0]), (added, expected[1])):
        assert (actual - exact).norm() <= tolerance * exact.norm()


def test_the_gradient_of_an_embedding_that_shares_the_weight_is_left_alone():
    inputs = problem(torch.float64)
    weight = inputs[1]
    weight.zero_out_wgrad = True  # Megatron's mark
    (loss_of(*inputs) + weight.sum() * 0.5).backward()
    assert torch.equal(weight.grad, torch.full_like(weight, 0.5))
    exact = exact_gradients(*inputs)[1]
    torch.testing.assert_close(weight.main_grad - BEFORE, exact, atol=1e-12, rtol=0)


@pytest.mark.parametrize("loss", [loss_of, other_loss_of])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_no_tensor_of_the_size_of_the_head_is_made(loss, dtype):
    inputs = problem(dtype)
    with logits_memory(1, 1, inputs[0]):
        pass  # which is kept from now on
    with Allocations() as made:
        loss(*inputs).backward()
    assert 0 < made.largest < VOCAB * HIDDEN / 2


def test_without_main_grad_one_is_made():
    """So the check above would see it."""
    inputs = problem(torch.bfloat16)
    with Allocations() as made:
        loss_of(*inputs, into_main_grad=False).backward()
    assert made.largest == VOCAB * HIDDEN
    assert (inputs[1].main_grad == BEFORE).all()


@pytest.mark.parametrize("loss", [loss_of, other_loss_of])
def test_rows_without_loss_and_passes_without_gradient_add_nothing(loss):
    none_of_them = problem(torch.float32, rows=0)
    loss(*none_of_them).backward()
    with torch.no_grad():
        inputs = problem(torch.float32)
        loss(*inputs)
    for _, weight, _, _ in (none_of_them, inputs):
        assert (weight.main_grad == BEFORE).all()


def test_a_loss_that_is_scaled_is_never_silently_wrong(ops_backend):
    inputs = problem(torch.float64)
    (2.0 * loss_of(*inputs)).backward()
    added = inputs[1].main_grad - BEFORE
    if ops_backend == "native":  # the gradient was there before its factor
        assert added.isnan().all()
    else:
        torch.testing.assert_close(added, 2 * exact_gradients(*inputs)[1], atol=1e-12, rtol=0)


def test_other_losses_may_be_scaled():
    inputs = problem(torch.float64)
    (2.0 * other_loss_of(*inputs)).backward()
    exact = 2 * exact_gradients(*inputs)[1]
    torch.testing.assert_close(inputs[1].main_grad - BEFORE, exact, atol=1e-12, rtol=0)


@pytest.mark.parametrize("loss", [loss_of, other_loss_of])
def test_a_weight_without_main_grad_is_refused(loss):
    hidden, weight, *rest = problem(torch.float32)
    with pytest.raises(ValueError, match="parameter has no main_grad: wrap its module"):
        loss(hidden, weight.detach(), *rest)


def test_products_of_half_precision_are_added_in_single():
    total = torch.ones(VOCAB, HIDDEN)
    left = torch.full((VOCAB, 1), 2.0**-12, dtype=torch.bfloat16)
    right = torch.ones(1, HIDDEN, dtype=torch.bfloat16)
    for _ in range(4):  # each would be lost in bfloat16, and the last one in float16
        add_widened(total, left, right)
    assert torch.equal(total, torch.full_like(total, 1 + 2.0**-10))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_first_product_takes_the_place_of_whatever_was_there(dtype):
    total = torch.full((VOCAB, HIDDEN), torch.nan)
    left, right = torch.ones(VOCAB, 2, dtype=dtype), torch.ones(2, HIDDEN, dtype=dtype)
    add_widened(total, left, right, overwrites=True)
    assert torch.equal(total, torch.full_like(total, 2.0))
