"""The study (`train.py --study`, plots/gap.py), and the comparison of a GPU's results."""
import dataclasses
from types import SimpleNamespace

import pytest
import torch

import train
from plots import gap
from tests import gpu

DEFAULT = train.Config()
CHANGED_FIELDS = [set(), {"width", "lr"}, {"rounds"}, {"rounds", "completions", "labels"},
                  {"rounds", "completions", "labels", "width", "lr"}]


def fake_policies(setup, settings):
    """One finished run of each method; with a wider network they all diverge."""
    policies = []
    for method in settings:
        rows, failure = [], None
        if setup.cfg.width > DEFAULT.width:
            failure = {"method": method, "reason": "loss not finite"}
        else:
            rows = [{"method": method, "setting": 1., "seed": 0, "step": 8, "reward": .6,
                     "reward_se": .01, "kl": 1., "kl_se": .1, "final": True}]
        value = {"method": method, "rows": rows, "failure": failure}
        policies.append(SimpleNamespace(setup=setup, value=value))
    return policies


@pytest.fixture
def study(monkeypatch):
    """The rows, failures and configurations of a study without training."""
    configurations = []

    def get_all(stages):
        return [{"panel": "nats"} for _ in stages]

    def prepare(cfg, seed, stages, device):
        configurations.append(dataclasses.asdict(cfg))
        return SimpleNamespace(cfg=cfg, seed=seed, stages=stages, key=f"pi_ref {cfg.width}")

    def add_shares(rows, optimum):
        for row in rows:
            row["optimum"] = optimum["seeds"]["0"]["key"]

    monkeypatch.setattr(train, "prepare", prepare)
    monkeypatch.setattr(train, "policy_stages", fake_policies)
    monkeypatch.setattr(gap.frontier, "estimate_optimum", lambda setup, _: {"key": setup.key})
    monkeypatch.setattr(gap.frontier, "choose_proposals", lambda setup, _: ())
    monkeypatch.setattr(gap.tables, "add_shares", add_shares)
    monkeypatch.setattr(gap.dpo, "optimal_reward", lambda kl, optimum: (.9, .06, 0.))
    setup = SimpleNamespace(cfg=DEFAULT, seed=0, device="cpu", key="pi_ref 64",
                            stages=SimpleNamespace(get_all=get_all))
    rows, failures = gap.study(setup, [], train.train_variant)
    return rows, failures, configurations


def test_the_study_changes_what_its_variants_say_and_names_what_failed(study):
    """A variant changes what its name says, all variants are drawn, a diverged run is reported."""
    rows, failures, configurations = study
    changed = [{name for name, x in cfg.items() if x != getattr(DEFAULT, name)}
               for cfg in configurations]
    assert changed == CHANGED_FIELDS
    finished = {row["variant"] for row in rows if row["panel"] == "share"}
    assert set(gap.VARIANTS) == set(gap.changed_fields(DEFAULT)), "each variant has a style"
    assert finished == set(gap.VARIANTS) - {gap.WIDE, gap.EQ_1_LABELS_WIDE}
    assert [failure["reason"] for failure in failures] == [
        f"{variant}: loss not finite" for variant in (gap.WIDE, gap.EQ_1_LABELS_WIDE)]


def test_labels_of_eq_1_get_the_betas_whose_price_is_that_of_the_target_kls():
    """The price of a nat is tau * beta; here the frontier has its price at each target KL."""
    optimum = {"kl": [1., 2., 4.], "beta": [.1, .05, .02], "reward": [.7, .77, .84], "se": [0.] * 3}
    cfg = dataclasses.replace(DEFAULT, kl_targets=(1., 2., 4.), tau=.1)
    assert gap.settings_of(gap.EQ_1_LABELS, cfg, optimum) == {"dpo": (.2, .5, 1.)}


def test_variants_with_the_same_pi_ref_have_the_same_optimum(study):
    """Shares are relative to the optimum of the sweep, unless pi_ref differs."""
    rows, *_ = study
    assert {row["optimum"] for row in rows if row["panel"] == "share"} == {"pi_ref 64"}


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
