"""The cost of each method: seconds until a policy has 80% of the optimal gain at KL 2.

Everything that a policy needs before its own training is included. A method and seed is represented
by the run that reaches the goal in the fewest training steps. Evaluations are noisy, so the goal is
reached at the first evaluation that is good enough and is followed by another good one.
"""
import re

from matplotlib.legend_handler import HandlerTuple

import dpo
from plots import COMPARED_KL, STYLE, plt, save
from plots.tables import optimum_of

SHARE = .8    # the goal: this share of the optimal gain at COMPARED_KL
COMPONENTS = {    # what a method needs before its training -> the stages of train.py, by name
    "SFT": r"train-reference-seed{seed}",
    "sampling and labelling": r"sample-completions-part-train-\d+-\d+-seed{seed}",
    "reward model": r"fit-reward-model-seed{seed}",
    "initial critic": r"initial-critic-{method}-seed{seed}",
}
SHADES = dict(zip(COMPONENTS, ("0.85", "0.7", "0.5", "0.3")))
ON_PAIRS = ["SFT", "sampling and labelling"]
PIPELINES = {    # method -> its components
    "dpo": ON_PAIRS,
    "ppo": list(COMPONENTS),
    "ppo_gt": [*ON_PAIRS, "initial critic"],
    "unlikelihood": ON_PAIRS,
    "preferred_ft": ON_PAIRS,
}
SECONDS_COLUMNS = [f"{component}_seconds" for component in COMPONENTS] + ["training_seconds"]


# ------------------------------------------------------------------------------ the first success
def run_key(row: dict) -> tuple:
    """The run that a row belongs to."""
    return row["method"], row["setting"], row["seed"]


def first_success(rows: list[dict], optimum: dict) -> list[dict]:
    """The first evaluation of each run that reaches the goal; runs that never do are left out.

    The goal has two conditions: the reward of 80% of the optimal gain at KL 2, and 80% of the
    optimal gain at the policy's own KL. The second one excludes rewards that cost more KL than
    they are worth. The next evaluation must meet both conditions too, because the best of several
    noisy evaluations is better than its policy. A finished policy needs no next evaluation.
    """
    def reaches_goal(row: dict) -> bool:
        curve = optimum_of(optimum, row["seed"])
        optimal, *_ = dpo.optimal_reward(COMPARED_KL, curve)
        min_reward = curve["ref_reward"] + SHARE * (optimal - curve["ref_reward"])
        return row["share"] is not None and row["share"] >= SHARE and row["reward"] >= min_reward

    runs = {}
    for row in sorted(rows, key=lambda row: row["step"]):
        runs.setdefault(run_key(row), []).append(row)
    found = []
    for run in runs.values():
        next_rows = run[1:]
        if run[-1]["final"]:
            next_rows = next_rows + [run[-1]]
        successes = [row for row, next_row in zip(run, next_rows)
                     if reaches_goal(row) and reaches_goal(next_row)]
        found += successes[:1]
    return found


# ---------------------------------------------------------------------------------------- the costs
def component_seconds(component: str, method: str, seed: int, seconds: dict[str, float]) -> float:
    """The seconds of all stages of a component of a method's pipeline, for one seed."""
    pattern = COMPONENTS[component].format(method=method, seed=seed)
    found = [s for name, s in seconds.items() if re.fullmatch(pattern, name)]
    assert found, f"no stage is named {pattern}"
    return sum(found)


def tokens_until(rows: list[dict], evaluation: dict, name: str) -> float:
    """The tokens of a run up to one of its evaluations; `name` is the column that counts them.

    A row holds the mean over the steps since the row before.
    """
    run = [row for row in rows
           if run_key(row) == run_key(evaluation) and row["step"] <= evaluation["step"]]
    run.sort(key=lambda row: row["step"])
    previous_steps = [0] + [row["step"] for row in run]
    return sum(row.get(name, 0.) * (row["step"] - previous_step)
               for row, previous_step in zip(run, previous_steps))


def compute_costs(rows: list[dict], optimum: dict, seconds: dict[str, float]) -> list[dict]:
    """The rows of the figure: for each method and seed the cheapest run that reaches the goal.

    `rows` are those of results.jsonl. `seconds` maps the name of a stage to the seconds of one
    thread that it took. A row has the seconds of each component of the pipeline. If no run reaches
    the goal, `arrived` is False, and the columns of a run are missing.
    """
    successes = first_success(rows, optimum)
    costs = []
    pipelines = {(row["method"], row["seed"]) for row in rows if row["method"] in PIPELINES}
    for method, seed in sorted(pipelines):
        candidates = [row for row in successes if (row["method"], row["seed"]) == (method, seed)]
        cost = {"figure": "cost", "method": method, "seed": seed, "arrived": bool(candidates)}
        for component in PIPELINES[method]:
            cost[f"{component}_seconds"] = component_seconds(component, method, seed, seconds)
        cost["settings_that_arrive"] = sorted({row["setting"] for row in candidates})
        if candidates:
            cheapest = min(candidates, key=lambda row: (row["step"], row["setting"]))
            cost.update(setting=cheapest["setting"], training_seconds=cheapest["seconds"],
                        kl=cheapest["kl"], reward=cheapest["reward"],
                        sampled_tokens=tokens_until(rows, cheapest, "sampled_tokens"),
                        trained_tokens=tokens_until(rows, cheapest, "trained_tokens"))
        costs.append(cost)
    return costs


# --------------------------------------------------------------------------------------- the figure
def draw_method(axis, y: int, rows: list[dict]) -> None:
    """Draw the bar of one method at height `y`, from its rows of all seeds, and label it.

    Each component has its shade; widths are means over the seeds that reach the goal. If there are
    none, a text replaces the bar.
    """
    colour = STYLE[rows[0]["method"]][1]
    colours = [*SHADES.values(), colour]
    arrived = [row for row in rows if row["arrived"]]
    text, end = "does not get there", 0.
    if arrived:
        for column, shade in zip(SECONDS_COLUMNS, colours):
            width = sum(row.get(column, 0.) for row in arrived) / len(arrived)
            axis.barh(y, width, left=end, color=shade, height=.6)
            end += width
        totals = [sum(row.get(column, 0.) for column in SECONDS_COLUMNS) for row in arrived]
        spread = ""
        if len(rows) > 1:
            spread = (f" ({min(totals):.0f}-{max(totals):.0f}, "
                      f"{len(arrived)} of {len(rows)} seeds)")
        kl = sum(row["kl"] for row in arrived) / len(arrived)
        text = f"{sum(totals) / len(totals):.0f} s{spread}, at KL {kl:.1f}"
    axis.annotate(text, (end, y), (5, 0), textcoords="offset points", va="center", fontsize=11)


def draw(rows: list[dict], path) -> None:
    """Draw one bar of seconds for each method, the components in shades of grey."""
    figure, axis = plt.subplots(figsize=(8, 4.2))
    methods = [method for method in STYLE if any(row["method"] == method for row in rows)]
    methods.reverse()    # bars are placed from bottom to top
    for y, method in enumerate(methods):
        draw_method(axis, y, [row for row in rows if row["method"] == method])
    axis.set_yticks(range(len(methods)), [STYLE[method][0] for method in methods], fontsize=11)
    shades = [axis.barh(0, 0, color=shade) for shade in SHADES.values()]
    policies = tuple(axis.barh(0, 0, color=STYLE[method][1]) for method in PIPELINES)
    axis.set(xlim=(0, max(axis.get_xlim()[1] * 2.1, 1)), ylim=(-.6, len(methods) - .4))
    goal = f"{SHARE:.0%} of the optimal gain at KL {COMPARED_KL:g}"
    axis.set_xlabel(f"seconds of one thread to {goal}", fontsize=12)
    axis.legend([*shades, policies], [*SHADES, "training of the policy"], fontsize=10,
                loc="lower right", handler_map={tuple: HandlerTuple(ndivide=None, pad=0)})
    save(figure, path)
