"""The contract of a preference loss, which takes a `dpo.Pair` and beta and returns (B,).

`python -m pytest --loss my_loss.py:my_loss` runs it on a loss of your own; without --loss it runs
on the losses of the paper and of tests/zoo.py.
"""
import torch

import dpo
import world

BETA = .3


def make_pairs():
    """Seven pairs with log-probabilities around -40 nats and responses of 5-15 tokens, float64.

    Only logp_w and logp_l require gradients.
    """
    generator = world.generator(3)
    noise = torch.randn(4, 7, generator=generator, dtype=torch.float64)
    logp_w, logp_l, ref_w, ref_l = (-40 + 10. * noise).clamp(max=-.1)            # (7,) each
    len_w, len_l = torch.randint(5, 16, (2, 7), generator=generator)
    return dpo.Pair(logp_w.requires_grad_(), logp_l.requires_grad_(), ref_w, ref_l, len_w, len_l)


def gradients(loss, pair):
    """dL/dlogp_w and dL/dlogp_l, each (B,); 0 for an input that the loss does not use."""
    total = loss(pair, BETA).sum()
    slopes = torch.autograd.grad(total, (pair.logp_w, pair.logp_l), allow_unused=True)
    return [torch.zeros_like(pair.logp_w) if slope is None else slope for slope in slopes]


def test_one_loss_for_each_pair(loss):
    """The loss of seven pairs is seven numbers, not their mean."""
    value = loss(make_pairs(), BETA)
    got = getattr(value, "shape", type(value))
    assert isinstance(value, torch.Tensor) and value.shape == (7,), \
        f"7 pairs must give 7 losses, shape (7,), not {got}: leave the mean to train.py"


def test_finite_at_enormous_log_ratios(loss):
    """Loss and gradients are finite at log-ratios of +-1e4 nats in float32.

    exp and log(sigmoid) overflow there; logsigmoid and softplus do not.
    """
    log_ratio = torch.tensor([1e4, -1e4, 0., 1e4])
    ref = torch.full((4,), -1.2e4)
    logp_w = (ref + log_ratio).requires_grad_()
    logp_l = (ref - log_ratio).requires_grad_()
    pair = dpo.Pair(logp_w, logp_l, ref, ref.clone(),
                    torch.tensor([9, 9, 7, 8]), torch.tensor([6, 9, 7, 8]))
    value = torch.cat([loss(pair, BETA), *gradients(loss, pair)])
    assert value.isfinite().all(), (f"loss and gradients at log-ratios of +-1e4 are "
                                    f"{value.tolist()}: use F.logsigmoid or F.softplus")


def test_pairs_do_not_see_each_other(loss):
    """The loss of a pair is the same alone and in a batch of seven: no batch statistics."""
    pair = make_pairs()
    in_batch = loss(pair, BETA)
    alone = torch.cat([loss(dpo.Pair(*[x[i:i + 1] for x in pair]), BETA) for i in range(7)])
    world.agree(alone.detach(), in_batch.detach(),
                "the loss of a pair depends on the other pairs in its batch")


def test_the_order_of_pairs_does_not_matter(loss):
    """Shuffling the pairs shuffles their losses in the same way."""
    pair = make_pairs()
    order = torch.tensor([3, 0, 6, 2, 5, 1, 4])
    shuffled = loss(dpo.Pair(*[x[order] for x in pair]), BETA)
    world.agree(shuffled.detach(), loss(pair, BETA).detach()[order],
                "the losses must move with their pairs")


def test_there_is_a_gradient(loss):
    """A gradient reaches logp_w or logp_l."""
    total = sum(slope.abs().sum() for slope in gradients(loss, make_pairs()))
    assert total > 0, ("no gradient reaches logp_w or logp_l: is something detached, or compared "
                       "instead of subtracted?")


def test_the_reference_and_all_that_is_read_are_left_alone(loss):
    """pi_ref is a constant, so it has no gradient after a backward pass.

    No input is changed in place, because the next epoch reads it again.
    """
    pair, before = make_pairs(), make_pairs()
    loss(pair, BETA).sum().backward()
    for name in pair._fields:
        assert torch.equal(getattr(pair, name), getattr(before, name)), f"{name} was changed"
    for name in ("ref_w", "ref_l", "len_w", "len_l"):
        x = getattr(pair, name)
        assert x.grad is None and not x.requires_grad, \
            f"{name} got a gradient: the reference is a constant"


def test_at_the_reference_the_winner_is_raised_and_the_loser_is_not(loss):
    """At pi = pi_ref: dL/dlogp_w <= 0 <= dL/dlogp_l, and one of them is not 0.

    A loss may ignore y_l.
    """
    pair = make_pairs()
    pair = pair._replace(ref_w=pair.logp_w.detach().clone(), ref_l=pair.logp_l.detach().clone())
    slope_w, slope_l = gradients(loss, pair)
    right_signs = (slope_w <= 0).all() and (slope_l >= 0).all()
    assert right_signs and (slope_w.abs() + slope_l.abs() > 0).all(), (
        f"at pi = pi_ref dL/dlogp_w = {slope_w.tolist()} must not be positive and dL/dlogp_l = "
        f"{slope_l.tolist()} not negative, and one of them not 0: is a sign flipped?")
