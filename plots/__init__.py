"""The figures, one module each: `measure` computes what training did not, `draw` draws its rows.

figures.py lists them; begin there. tables.py prints the tables, nats.py measures for gap.py, and
class_frontier.py is for a class. This file has what the figures share: styles, statistics, and the
choice of the policies to show.
"""
import copy
import pathlib

import matplotlib
import numpy
import torch
from torch import Tensor, nn

import data
from harness import Stage, cached

matplotlib.use("Agg")    # write files, never open a window
import matplotlib.pyplot as plt    # noqa: E402 (after the backend is chosen)

COMPARED_KL = 2.    # nats, at which the figures compare policies
MIN_ESS = 50    # the optimum is reliable, and drawn solid, from this effective sample size on
PUBLISHED = pathlib.Path(__file__).parent    # the figures and results that the README shows
BEST_OF_N = "best_of_n", "best_of_n_gt"
STYLE = {    # method -> label, colour, marker; the palette of Okabe and Ito, safe for colour-blind
    "sft": ("SFT", "#000000", "*"),
    "dpo": ("DPO", "#D55E00", "o"),
    "ppo": ("PPO (learned reward)", "#0072B2", "s"),
    "ppo_gt": ("PPO-GT (true reward)", "#56B4E9", "D"),
    "unlikelihood": ("Unlikelihood", "#E69F00", "v"),
    "preferred_ft": ("Preferred-FT", "#009E73", "^"),
    "best_of_n": ("Best-of-N (learned reward)", "#CC79A7", "p"),
    "best_of_n_gt": ("Best-of-N (true reward)", "#882255", "h"),
}
USER_STYLE = [("#E7298A", "P"), ("#8C564B", ">"), ("#999933", "h"), ("#7F3FBF", "p"),
              ("#B22222", "<"), ("#2F4F4F", "8"), ("#66A61E", "d")]    # colour, marker


def styles_of(methods) -> dict[str, tuple[str, str, str]]:
    """Label, colour and marker of each method; users' losses take the next free ones."""
    user_losses = sorted(set(methods) - set(STYLE))
    extra = {name: (name, *USER_STYLE[i % len(USER_STYLE)])
             for i, name in enumerate(user_losses)}
    return {**STYLE, **extra}


def mean_and_se(x: Tensor) -> tuple[float, float]:
    """The mean and its standard error, clustered by prompt: (X prompts, n samples) -> two numbers.

    Samples of one prompt are not independent, so the error is that of the prompts' means.
    """
    by_prompt = x.cpu().double().mean(1)
    return by_prompt.mean().item(), (by_prompt.std() / len(by_prompt) ** .5).item()


def mean_over_steps(steps: list[dict[str, float]]) -> dict[str, float]:
    """The mean of each statistic over some steps, and its standard error as NAME_se."""
    means = {}
    for name in steps[0]:
        x = torch.tensor([step[name] for step in steps], dtype=torch.float64)
        means[name] = x.mean().item()
        # std(correction=0) / sqrt(n - 1) is the usual standard error; for one step it is 0
        means[f"{name}_se"] = x.std(correction=0).item() / max(len(x) - 1, 1) ** .5
    return means


def verdict(r_1: Tensor, r_2: Tensor) -> Tensor:
    """1 where response 1 has the higher reward, 0 where it has the lower one, .5 for a tie.

    r_1 and r_2, of shapes that broadcast -> float64.
    """
    return (r_1 > r_2).double() + .5 * (r_1 == r_2).double()


def checkpoint_near_kl(runs: list[dict], method: str, kl: float = COMPARED_KL) -> dict | None:
    """The checkpoint of a method whose KL is nearest to `kl` nats, if any.

    Figures compare the methods at equal KL. A finished policy within a tenth of `kl` is preferred
    to one during training. Without either, the nearest finished policy is returned. -> method,
    setting, step, kl, and `state`, the parameters for `load_policy`.
    """
    candidates = []
    for run in runs:
        if run["method"] == method:
            candidates += [{**row, "state": state}
                           for row, state in zip(run["rows"], run["checkpoints"])]
    near = [row for row in candidates if abs(row["kl"] - kl) <= kl / 10]
    finished = [row for row in near if row["final"]]
    fallback = [row for row in candidates if row["final"]] or candidates    # if all runs failed
    nearest = min(finished or near or fallback, key=lambda row: abs(row["kl"] - kl), default=None)
    if nearest is None:
        return None
    return {name: nearest[name] for name in ("method", "setting", "step", "kl", "state")}


def runs_near_kl(runs: list[dict], method: str) -> list[dict]:
    """A list of the run that has the checkpoint of `checkpoint_near_kl`; empty without one."""
    near = checkpoint_near_kl(runs, method)
    return [run for run in runs
            if near and (run["method"], run["setting"]) == (method, near["setting"])]


# pi_ref in the format of `checkpoint_near_kl`
REFERENCE = {"method": "sft", "setting": 0., "step": 0, "kl": 0., "state": {}}


@cached
def prompts_of_split(setup, split: str, count: int) -> tuple[Tensor, Tensor]:
    """Prompts from the first `count` reviews of a split -> ids (count, P), lengths (count,)."""
    texts = setup.corpus[split][:count]
    rng = data.named_rng("prompts", split, setup.cfg.seed)
    return data.make_prompts(setup.encoding, texts, rng)


def evaluation_prompts(setup) -> tuple[Tensor, Tensor]:
    """The held-out prompts of results.jsonl and of most figures: ids (X, P), lengths (X,)."""
    texts = setup.corpus[setup.cfg.split][:setup.cfg.eval_prompts]
    prompts = data.make_prompts(setup.encoding, texts, data.named_rng("evaluation", setup.cfg.seed))
    return tuple(p.to(setup.device) for p in prompts)


def load_policy(setup, state: dict) -> nn.Module:
    """The policy with these parameters; pi_ref if there are none."""
    policy = copy.deepcopy(setup.ref)
    policy.load_state_dict(state or setup.ref.state_dict())
    return policy


def load_finished_policy(setup, stage: Stage) -> nn.Module:
    """The finished policy of a stage of train.py."""
    return load_policy(setup, stage.value["checkpoints"][-1])


def reliable_kl(optimum: dict) -> float:
    """The KL, nats, up to which the optimum rests on at least MIN_ESS effective samples.

    Between the last point of the curve that has them and the next, their number is interpolated.
    """
    points = sorted(zip(optimum["kl"], optimum["ess"]))
    reliable = [i for i, (_, ess) in enumerate(points) if ess >= MIN_ESS]
    if not reliable:
        return 0.
    last_and_next = points[reliable[-1]:reliable[-1] + 2]    # the last alone, if the curve ends
    ess, kl = zip(*sorted((ess, kl) for kl, ess in last_and_next))
    return float(numpy.interp(MIN_ESS, ess, kl))


def short_label(method: str) -> str:
    """The label of a method without the words in parentheses."""
    return STYLE[method][0].split(" (")[0]


def paired_bar_style(is_filled: bool, colour: str) -> dict[str, str]:
    """Keyword arguments of `bar`: filled or hatched, for two bars of one colour side by side."""
    if is_filled:
        return {"color": colour, "edgecolor": colour}
    return {"color": "white", "edgecolor": colour, "hatch": "///"}


def label_with_kl(row: dict) -> str:
    """The label of a method with the KL of the policy that represents it."""
    label = short_label(row["method"])
    return f"{label}, KL {row['kl']:.1f}" if row["kl"] else label


def save(figure, path) -> None:
    """Write a figure to a file, and free its memory."""
    figure.tight_layout()
    figure.savefig(path, dpi=105)
    plt.close(figure)
