"""The figures: one module each, `measure` what training did not, `draw` from results alone. Shared: names, colours, files."""
import copy
import json
import pathlib

import matplotlib
import torch

matplotlib.use("Agg")    # files, never a window
import matplotlib.pyplot as plt  # noqa: E402  (after the backend is chosen)

SOLID = 50    # effective samples that the optimum must rest on to be trusted, and drawn solid
HERE = pathlib.Path(__file__).parent
STYLE = {    # method -> (legend, colour, marker); Okabe and Ito's palette, safe for colour-blind readers
    "sft": ("SFT", "#000000", "*"),
    "dpo": ("DPO", "#D55E00", "o"),
    "ppo": ("PPO (learned reward)", "#0072B2", "s"),
    "ppo_gt": ("PPO-GT (true reward)", "#56B4E9", "D"),
    "unlikelihood": ("Unlikelihood", "#E69F00", "v"),
    "preferred_ft": ("Preferred-FT", "#009E73", "^"),
    "best_of_n": ("Best-of-N (learned reward)", "#CC79A7", "p"),
    "best_of_n_gt": ("Best-of-N (true reward)", "#882255", "h"),
}
STUDENTS = [("#E7298A", "P"), ("#8C564B", ">"), ("#999933", "h"), ("#7F3FBF", "p"), ("#B22222", "<"), ("#2F4F4F", "8"),
            ("#66A61E", "d")]


def style(methods) -> dict[str, tuple[str, str, str]]:
    """Legend, colour and marker of each method: the paper's are always the same, students' losses take the next free ones."""
    new = sorted(set(methods) - set(STYLE))
    return {**STYLE, **{name: (name, *STUDENTS[i % len(STUDENTS)]) for i, name in enumerate(new)}}


def load_lines(path: pathlib.Path) -> list[dict]:
    """A file of one JSON object a line; nothing where there is no file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def nearest(runs: list[dict], method: str, kl: float = 2.) -> dict | None:
    """The finished run of a method, of the first seed, whose KL is nearest to `kl` nats: how figures choose the policy they show."""
    done = [run for run in runs if run["method"] == method and not run["failure"] and run["seed"] == runs[0]["seed"]]
    return min(done, key=lambda run: abs(run["rows"][-1]["kl"] - kl), default=None)


def policy_of(lab, state: dict) -> torch.nn.Module:
    """The policy that a run kept, {} for pi_ref."""
    policy = copy.deepcopy(lab.ref)
    policy.load_state_dict(state or lab.ref.state_dict())
    return policy


def save(figure, path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=105)
    plt.close(figure)
