"""What any preference loss must keep to; `python -m pytest --loss my_loss.py:my_loss` runs it on a loss of your own.

Without --loss it runs on the losses of the paper and of the zoo. A loss is given a `Pair` and beta and returns (B,).
"""
import torch

import dpo
import world

BETA = .3


def pairs(scale=10., dtype=torch.float64):
    """Seven pairs with log-probabilities around -40, each 5-15 tokens long; only logp_w and logp_l ask for gradients."""
    g = world.generator(3)
    logp_w, logp_l, ref_w, ref_l = (-40 + scale * torch.randn(4, 7, generator=g, dtype=torch.float64)).clamp(max=-.1).to(dtype)
    lengths = torch.randint(5, 16, (2, 7), generator=g)
    return dpo.Pair(logp_w.requires_grad_(), logp_l.requires_grad_(), ref_w, ref_l, *lengths)


def gradients(loss, pair):
    """dL/dlogp_w and dL/dlogp_l, 0 for what the loss does not look at; each (B,)."""
    found = torch.autograd.grad(loss(pair, BETA).sum(), pair[:2], allow_unused=True)
    return [torch.zeros_like(pair.logp_w) if g is None else g for g in found]


def test_one_loss_for_each_pair(loss):
    value = loss(pairs(), BETA)
    assert isinstance(value, torch.Tensor) and value.shape == (7,), \
        f"7 pairs must give 7 losses, shape (7,), not {getattr(value, 'shape', type(value))}: leave the mean to train.py"


def test_finite_at_enormous_log_ratios(loss):
    """Log-ratios of +-1e4 in float32: exp and log(sigmoid) overflow there, logsigmoid and softplus do not."""
    big = torch.tensor([1e4, -1e4, 0., 1e4])
    pair = dpo.Pair((-1.2e4 + big).requires_grad_(), (-1.2e4 - big).requires_grad_(), torch.full((4,), -1.2e4), torch.full((4,), -1.2e4),
                    torch.tensor([9, 9, 7, 8]), torch.tensor([6, 9, 7, 8]))
    value = torch.cat([loss(pair, BETA), *gradients(loss, pair)])
    assert value.isfinite().all(), f"loss and gradients at log-ratios of +-1e4 are {value.tolist()}: use F.logsigmoid or F.softplus"


def test_pairs_do_not_see_each_other(loss):
    """The loss of a pair is the same whether it comes alone or with six others: no batch mean, no batch-wide baseline."""
    pair, value = pairs(), loss(pairs(), BETA)
    alone = torch.cat([loss(dpo.Pair(*[x[i:i + 1] for x in pair]), BETA) for i in range(7)])
    world.agree(alone.detach(), value.detach(), "the loss of a pair depends on the others in its batch")


def test_the_order_of_pairs_does_not_matter(loss):
    order, pair = torch.tensor([3, 0, 6, 2, 5, 1, 4]), pairs()
    shuffled = loss(dpo.Pair(*[x[order] for x in pair]), BETA)
    world.agree(shuffled.detach(), loss(pair, BETA).detach()[order], "the losses must move with their pairs")


def test_there_is_a_gradient(loss):
    total = sum(g.abs().sum() for g in gradients(loss, pairs()))
    assert total > 0, "no gradient reaches logp_w or logp_l: is something detached, or compared instead of subtracted?"


def test_the_reference_and_all_that_is_read_are_left_alone(loss):
    """pi_ref is a constant: after a backward pass it has no gradient; and nothing is changed in place, the next epoch reads it again."""
    pair, before = pairs(), pairs()
    loss(pair, BETA).sum().backward()
    for name in pair._fields:
        assert torch.equal(getattr(pair, name), getattr(before, name)), f"{name} was changed"
    for name in ("ref_w", "ref_l", "len_w", "len_l"):
        x = getattr(pair, name)
        assert x.grad is None and not x.requires_grad, f"{name} got a gradient: the reference is a constant"


def test_at_the_reference_the_winner_is_raised_and_the_loser_is_not(loss):
    """At pi = pi_ref: dL/dlogp_w <= 0 <= dL/dlogp_l, and one of them is not 0 (a loss may ignore y_l)."""
    ref = pairs()
    pair = ref._replace(ref_w=ref.logp_w.detach().clone(), ref_l=ref.logp_l.detach().clone())
    w, l = gradients(loss, pair)
    assert (w <= 0).all() and (l >= 0).all() and (w.abs() + l.abs() > 0).all(), \
        f"at pi = pi_ref dL/dlogp_w = {w.tolist()} must not be positive, dL/dlogp_l = {l.tolist()} not negative: is a sign flipped?"
