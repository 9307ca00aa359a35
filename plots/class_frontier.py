"""The losses of a class on one frontier.

`python -m tests.grade SUBMISSION` writes the curve of a submission into SUBMISSION/graded; this
module draws those of several submissions under the optimum and lists them in a table.
"""
import json
import pathlib

import harness
from plots import frontier, tables

GRADED = "graded"


class Curve:
    """The graded submission in a folder."""
    def __init__(self, folder: pathlib.Path):
        """Raises OSError or ValueError if the folder has no results."""
        graded = folder / GRADED if (folder / GRADED).is_dir() else folder
        self.name = folder.resolve().name
        self.results = json.loads((graded / "results.json").read_text("utf-8"))
        rows = harness.read_jsonl(graded / "results.jsonl")
        self.rows = [{**row, "method": self.name} for row in rows]
        self.optimum = harness.read_jsonl(graded / "optimum.json")[0] if rows else None

    def contract(self) -> str:
        """Whether the loss kept its contract; - if none was handed in."""
        tests = [test for test in self.results["tests"] if test["name"] == "my_loss.py: contract"]
        if not tests:
            return "-"
        return "kept" if tests[0]["score"] == tests[0]["max_score"] else "broken"


def read_curves(folders: list[pathlib.Path]) -> list[Curve]:
    """The submissions in these folders. Raises ValueError if they cannot be compared."""
    curves = [Curve(folder) for folder in folders]
    names = [curve.name for curve in curves]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"several folders are named {', '.join(twice)}")
    with_rows = [curve for curve in curves if curve.rows]
    if not with_rows:
        raise ValueError("none of the submissions has a trained policy")
    first = with_rows[0]
    for curve in with_rows:
        if curve.optimum != first.optimum:
            raise ValueError(f"{curve.name} was graded with other baselines than {first.name}: "
                             "grade both again")
    return curves


def table(curves: list[Curve]) -> str:
    """Name, KL, reward, share, and contract: a line for each finished policy, the best first."""
    lines = [f"{'name':<24}{'beta':>8}{'KL':>8}{'reward':>8}{'share':>7}{'+-':>6}  contract"]
    entries = []
    for curve in curves:
        final = [row for row in curve.rows if row["final"]]
        if not final:
            entries.append((-1., f"{curve.name[:24]:<24}{'no policy':>24}{'':>13}  "
                                 f"{curve.contract()}"))
        for row in final:
            entries.append((row["share"] or 0., f"{curve.name[:24]:<24}{row['setting']:>8g}"
                            f"{row['kl']:>8.2f}{row['reward']:>8.3f}{tables.share_cells(row)}  "
                            f"{curve.contract()}"))
    entries.sort(key=lambda entry: -entry[0])
    return "\n".join(lines + [line for _, line in entries])


def draw_class(folders: list[pathlib.Path], path: pathlib.Path) -> str:
    """Draw the curves of all submissions; returns the tables. Raises OSError or ValueError."""
    curves = read_curves(folders)
    rows = [row for curve in curves for row in curve.rows]
    optimum = next(curve.optimum for curve in curves if curve.rows)
    frontier.draw(rows, optimum, path)
    return f"{table(curves)}\n\n{tables.table_of_shares(rows)}"
