"""The study (`train.py --study`, plots/gap.py), and the comparison of a GPU's results."""
import dataclasses
import functools
import inspect
import math
import statistics
from types import SimpleNamespace

import pytest
import torch

import data
import dpo
import train
from plots import gap
from tests import gpu

DEFAULT = train.Config()
CHANGED_FIELDS = [set(), {"width", "lr"}, {"rounds"},
                  {"rounds", "completions", "labels", "ppo_batch"}]


def fake_policies(setup, settings, wide_fails):
    """One finished run of each method; with a wider network they may all diverge."""
    policies = []
    for method in settings:
        rows, failure = [], None
        if wide_fails and setup.cfg.width > DEFAULT.width:
            failure = {"method": method, "reason": "loss not finite"}
        else:
            rows = [{"method": method, "setting": 1., "seed": 0, "step": 8, "reward": .6,
                     "reward_se": .01, "kl": 1., "kl_se": .1, "final": True}]
        value = {"method": method, "setting": 1., "rows": rows, "failure": failure}
        policies.append(SimpleNamespace(setup=setup, path=(setup.key, method), value=value))
    return policies


@pytest.fixture
def study(monkeypatch, request):
    """The stages that measure, failures and configurations of a study without training."""
    configurations = []

    def prepare(cfg, seed, stages, device):
        configurations.append(dataclasses.asdict(cfg))
        return SimpleNamespace(cfg=cfg, seed=seed, stages=stages, key=f"pi_ref {cfg.width}")

    monkeypatch.setattr(train, "prepare", prepare)
    wide_fails = getattr(request, "param", True)
    monkeypatch.setattr(train, "policy_stages",
                        functools.partial(fake_policies, wide_fails=wide_fails))
    monkeypatch.setattr(gap.frontier, "estimate_optimum", lambda setup, _: {})
    monkeypatch.setattr(gap.frontier, "choose_proposals", lambda setup, _: (setup.key,))
    monkeypatch.setattr(gap.dpo, "optimal_reward", lambda kl, optimum: (.9, .06, 0.))
    setup = SimpleNamespace(cfg=DEFAULT, seed=0, device="cpu", key="pi_ref 64",
                            stages=SimpleNamespace(get_all=list))
    measurements, failures = gap.study(setup, [], ("fits",), train.train_variant)
    return measurements, failures, configurations


def stages_of(measurements, function):
    """The stages of one function of plots/gap.py."""
    return [stage for stage in measurements if stage.function is inspect.unwrap(function)]


def test_the_study_changes_what_its_variants_say_and_names_what_failed(study):
    """A variant changes what its name says, all variants are drawn, a diverged run is reported."""
    measurements, failures, configurations = study
    changed = [{name for name, x in cfg.items() if x != getattr(DEFAULT, name)}
               for cfg in configurations]
    assert changed == CHANGED_FIELDS
    assert set(gap.VARIANTS) == set(gap.changed_fields(DEFAULT)), "each variant has a style"
    for function in (gap.measure_share, gap.measure_policy):
        measured = {stage.arguments[0] for stage in stages_of(measurements, function)}
        assert measured == set(gap.VARIANTS) - {gap.WIDE}
    assert [failure["reason"] for failure in failures] == [f"{gap.WIDE}: loss not finite"]


def test_labels_of_eq_1_get_the_betas_whose_price_is_that_of_the_target_kls():
    """The price of a nat is tau * beta; here the frontier has its price at each target KL."""
    optimum = {"kl": [1., 2., 4., 7.], "beta": [.1, .05, .02, .01],
               "reward": [.7, .77, .84, .88], "se": [0.] * 4}
    cfg = dataclasses.replace(DEFAULT, kl_targets=(1., 2., 4., 7.), tau=.1)
    assert gap.settings_of(gap.EQ_1_LABELS, cfg, optimum) == {"dpo": (.2, .5, 1.)}


@pytest.mark.parametrize("study", [False], indirect=True)
def test_variants_have_the_optimum_of_their_own_pi_ref(study):
    """Shares are relative to the optimum of the sweep, unless pi_ref differs."""
    measurements, *_ = study
    shares = stages_of(measurements, gap.measure_share)
    samplers = {stage.arguments[0]: stage.arguments[4] for stage in shares}
    same_pi_ref = dict.fromkeys(gap.VARIANTS, ("fits",))
    assert samplers == {**same_pi_ref, gap.WIDE: ("pi_ref 128",)}


def test_the_share_is_that_of_the_sweep_with_the_error_of_the_gaps_of_the_prompts(monkeypatch):
    """share = 1 - mean gap / (F(KL) - E_ref[r]); its error is that of the gaps, over prompts.

    The responses have the random numbers of train.evaluate.
    """
    generator = torch.Generator().manual_seed(0)
    reward, kl = (torch.rand(5, 3, generator=generator) for _ in range(2))
    samples = (torch.rand(5, 40, generator=generator), torch.randn(5, 40, generator=generator))
    states = []

    def sample_rewards(setup, policy, prompts, count, given):
        states.append(given.initial_seed())
        return reward, kl, None

    monkeypatch.setattr(gap.frontier, "sample_rewards", sample_rewards)
    monkeypatch.setattr(gap.frontier, "samples_of_optimum", lambda setup, proposals: samples)
    monkeypatch.setattr(gap, "evaluation_prompts", lambda setup: None)
    monkeypatch.setattr(gap, "load_finished_policy", lambda setup, stage: None)
    setup = SimpleNamespace(cfg=DEFAULT, device="cpu", ref=None)
    final = {"step": 7, "reward": reward.mean().item(),
             "kl": kl.mean().item()}
    stage = SimpleNamespace(value={"rows": [{}, final]})
    row = inspect.unwrap(gap.measure_share)(setup, "a variant", "dpo", 2., stage, ())
    optimum = gap.frontier.optimum_from_samples(*samples)
    optimal, share, _ = dpo.share_of_optimal_gain(row["reward"], 0., row["kl"], 0., optimum)
    assert row["share"] == pytest.approx(share, abs=1e-6)
    _, beta, _ = dpo.optimal_reward(row["kl"], optimum)
    gaps = []
    for x in range(5):
        weights = [math.exp(w) for w in samples[1][x].tolist()]
        z = sum(w * math.exp(r / beta) for w, r in zip(weights, samples[0][x].tolist())) / 40
        gaps.append(beta * (math.log(z) + kl[x].mean().item()) - reward[x].mean().item())
    error = statistics.stdev(gaps) / 5 ** .5 / (optimal - optimum["ref_reward"])
    assert row["share_se"] == pytest.approx(error, rel=1e-4)
    names = "evaluation", "dpo", 2., 7, DEFAULT.seed
    assert states == [data.named_generator(*names).initial_seed()]


def test_the_rank_accuracy_is_the_share_of_pairs_without_ties_that_agree():
    """Counted by hand; a prompt whose responses all tie is left out."""
    reward = torch.tensor([[.1, .5, .9], [.2, .2, .8], [.3, .3, .3]])
    implied = torch.tensor([[0., 2., 1.], [5., 1., 3.], [1., 2., 3.]])
    expected = torch.tensor([[2 / 3], [1 / 2]])
    torch.testing.assert_close(gap.agreement(implied, reward), expected)


def test_the_table_for_a_gpu_counts_standard_errors_between_two_results():
    """A policy is compared with the published one of the same method, setting and seed."""
    row = {"method": "dpo", "setting": 2., "seed": 1, "final": True, "kl": 3., "reward": .80,
           "reward_se": .03}
    published = [{**row, "reward": .85, "reward_se": .04}, {**row, "seed": 2, "reward": .1}]
    [line] = gpu.compare([row, {**row, "setting": 7.}], published)
    assert "1.0 standard errors apart" in line
