"""The lists of all figures, and the files of a run's folder from which they are drawn.

results.jsonl    one row for each evaluation of a policy
measured.jsonl   rows that single figures measured; the column `figure` names the figure
optimum.json     the optimal frontier
failures.jsonl   runs that failed, with the reason

A new figure is a module in plots/, imported here. One that needs policies has measure(setup, runs)
-> rows and draw(rows, path), and a line in FROM_POLICIES. Each row has "figure": its name. `runs`
are the values of `train.train_policy`, and setup.learned_reward(ids, mask) scores responses. One
that needs results.jsonl alone has draw(rows, optimum, path), and a line in FROM_RESULTS.
"""
import pathlib
from typing import Callable

from torch import Tensor

import harness
from harness import Stage, cached
from plots import (best_of_n, cost, degeneration, domains, frontier, gap, inside, judges,
                   overoptimisation, prompts, samples, tables, winrate)

PROGRESS = []    # rows of users' losses that this process trains
FROM_RESULTS = {    # from results.jsonl and optimum.json: draw(rows, optimum, path)
    "frontier": frontier,
    "inside": inside,
}
FROM_POLICIES = {    # measure(setup, runs) -> rows, each with "figure": this name; draw(rows, path)
    "winrate": winrate,    # the slowest first, so that the workers finish together
    "best_of_n": best_of_n,
    "overoptimisation": overoptimisation,
    "domains": domains,
    "prompts": prompts,
    "judges": judges,
    "degeneration": degeneration,
    "samples": samples,
}
FROM_ROWS = {    # from rows that `compute_costs` and `study` make: draw(rows, path)
    "cost": cost,
    "gap": gap,
}


@cached
def measure_figure(setup, name: str, measure: Callable, trained: tuple[Stage, ...],
                   make_learned_score: Callable) -> list[dict]:
    """The rows of a figure that needs policies. `name` is only for the name of the stage's file."""
    score = make_learned_score(setup)

    def learned_reward(ids: Tensor, mask: Tensor) -> Tensor:
        return score(ids, mask).round(decimals=4)    # the batch changes the last digits

    return measure(setup._replace(learned_reward=learned_reward),
                   [stage.value for stage in trained])


def measure_all(setup, trained: list[Stage], make_learned_score: Callable) -> list[dict]:
    """The rows of all figures that need policies.

    `trained` are stages of train.py, of which those of the setup's seed are shown.
    make_learned_score(setup) -> the learned reward of (ids, mask).
    """
    of_this_seed = tuple(stage for stage in trained if stage.setup.seed == setup.seed)
    stages = [Stage(measure_figure, setup, name, figure.measure, of_this_seed, make_learned_score)
              for name, figure in FROM_POLICIES.items()]
    return sum(setup.stages.get_all(stages), [])


def write_results(folder: pathlib.Path, rows: list[dict], failures: list[dict], optimum: dict,
                  measured: list[dict]) -> None:
    """Write the four files of results."""
    harness.write_jsonl(folder / "results.jsonl", rows)
    harness.write_jsonl(folder / "failures.jsonl", failures)
    harness.write_jsonl(folder / "optimum.json", [optimum])
    harness.write_jsonl(folder / "measured.jsonl", measured)


def earlier_rows(folder: pathlib.Path, optimum: dict, measured: list[dict]) -> list[dict]:
    """Rows of measured.jsonl, of figures that `measured` lacks, from an earlier command.

    There are none if that command had another optimum: its shares would not fit.
    """
    if harness.read_jsonl(folder / "optimum.json") != [optimum]:
        return []
    names = {row["figure"] for row in measured}
    earlier = harness.read_jsonl(folder / "measured.jsonl")
    return [row for row in earlier if row["figure"] not in names]


def draw_progress(folder: pathlib.Path, row: dict) -> None:
    """Draw a row of results, of a policy that is being trained, into the frontier of the folder.

    Prints its share of the optimal gain. Without results of the baselines it does nothing. Each
    worker draws only the policies that it trains itself; the figure at the end has all.
    """
    optimum = harness.read_jsonl(folder / "optimum.json")
    if not optimum or str(row["seed"]) not in optimum[0].get("seeds", {}):
        return
    row = {**row}
    tables.add_shares([row], optimum[0])
    if row["share"] is not None:
        print("    share of the optimal gain {share:.0%} +- {share_se:.0%}".format(**row),
              flush=True)
    PROGRESS.append(row)
    trained = {other["method"] for other in PROGRESS}
    rows = [other for other in harness.read_jsonl(folder / "results.jsonl")
            if other["method"] not in trained]
    frontier.draw(rows + PROGRESS, optimum[0], folder / "frontier.png")


def draw_all(folder: pathlib.Path) -> list[str]:
    """Draw every figure that has results in the folder; returns the names of those it tried.

    Raises FileNotFoundError if the folder has no results.jsonl or no optimum.json.
    """
    for name in ("results.jsonl", "optimum.json"):
        if not (folder / name).exists():
            raise FileNotFoundError(f"there is no {name}")
    rows = harness.read_jsonl(folder / "results.jsonl")
    [optimum] = harness.read_jsonl(folder / "optimum.json")
    measured = harness.read_jsonl(folder / "measured.jsonl")
    names = []
    for name, module in FROM_RESULTS.items():
        module.draw(rows, optimum, folder / f"{name}.png")
        names.append(name)
    for name, module in {**FROM_POLICIES, **FROM_ROWS}.items():
        figure_rows = [row for row in measured if row["figure"] == name]
        if figure_rows:
            module.draw(figure_rows, folder / f"{name}.png")
            names.append(name)
    return names
