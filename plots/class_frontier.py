"""The losses of a class on one frontier.

`python -m tests.grade SUBMISSION` writes the curve of a submission into SUBMISSION/graded; this
module draws the finished policies of several submissions under the optimum and lists them in a
table. A run of the baselines among the folders, such as runs/graded-default, is drawn beside them.
"""
import json
import pathlib

import numpy

import harness
from plots import STYLE, USER_STYLE, frontier, plt, save, tables
from tests.points import MIN_KL

GRADED = "graded"
NUMBER_SIZE = 9                      # of the numbers beside the markers, in points
STUDENT_SIZE, BASELINE_SIZE, SFT_SIZE = 7, 5, 9    # of the markers, in points
LINES = {"mew": .4, "elinewidth": .6}              # their widths at the markers, in points


class Curve:
    """The policies in a folder: those of a graded submission, or of a run of the baselines."""
    def __init__(self, folder: pathlib.Path):
        """Raises OSError or ValueError if the folder has no results."""
        graded = folder / GRADED if (folder / GRADED).is_dir() else folder
        self.name = folder.resolve().name
        self.rows = harness.read_jsonl(graded / "results.jsonl")
        self.optimum = harness.read_jsonl(graded / "optimum.json")[0] if self.rows else None
        results = graded / "results.json"
        self.is_baselines = bool(self.rows) and not results.exists()
        self.tests = [] if self.is_baselines else json.loads(results.read_text("utf-8"))["tests"]

    def contract(self) -> str:
        """Whether the loss kept its contract; - if none was handed in."""
        tests = [test for test in self.tests if test["name"] == "my_loss.py: contract"]
        if not tests:
            return "-"
        return "kept" if tests[0]["score"] == tests[0]["max_score"] else "broken"

    def finished(self) -> list[dict]:
        """The rows of the finished policies."""
        return [row for row in self.rows if row["final"]]


def read_curves(folders: list[pathlib.Path]) -> list[Curve]:
    """The curves in these folders. Raises ValueError if they cannot be compared."""
    curves = [Curve(folder) for folder in folders]
    names = [curve.name for curve in curves]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"several folders are named {', '.join(twice)}")
    with_rows = [curve for curve in curves if curve.rows]
    if all(curve.is_baselines for curve in with_rows):
        raise ValueError("none of the submissions has a trained policy")
    first = next(curve for curve in with_rows if not curve.is_baselines)
    for curve in with_rows:
        if curve.optimum != first.optimum:
            raise ValueError(f"{curve.name} has other baselines than {first.name}: grade all "
                             "submissions with the same ones")
    return curves


def number_and_name(number: int, curve: Curve) -> str:
    """The first two cells of a submission in the tables; never the name of a method in STYLE."""
    return f"{number:>3} {curve.name[:24]}"


# ---------------------------------------------------------------------------------------- tables
def rank(row: dict) -> tuple[int, float]:
    """The key that sorts policies: by share, then beyond the optimum's curve, then hardly moved."""
    if row["kl"] < MIN_KL:
        return 2, 0.
    return (1, 0.) if row["share"] is None else (0, -row["share"])


def line_of_policy(name: str, row: dict, contract: str) -> str:
    """A line of the table."""
    is_noise = row["kl"] < MIN_KL
    share = f"{'hardly moved':>13}" if is_noise else tables.share_cells(row)
    return (f"{name:<28}{row['setting']:>8g}{row['kl']:>8.2f}{row['reward']:>8.3f}{share}  "
            f"{contract}")


def table(submissions: dict[int, Curve], baselines: list[dict]) -> str:
    """Number, name, KL, reward, share, and contract: a line for each finished policy, best first.

    DPO has lines too, without a number. Last come policies that hardly moved, and after them
    submissions that have no policy.
    """
    lines = [f"{'no.':>3} {'name':<24}{'beta':>8}{'KL':>8}{'reward':>8}{'share':>7}{'+-':>6}  "
             "contract"]
    entries = [(rank(row), line_of_policy(f"{'-':>3} DPO", row, "-"))
               for row in baselines if row["method"] == "dpo"]
    for number, curve in submissions.items():
        name, contract = number_and_name(number, curve), curve.contract()
        entries += [(rank(row), line_of_policy(name, row, contract)) for row in curve.finished()]
        if not curve.finished():
            entries.append(((3, 0.), f"{name:<28}{'no policy':>24}{'':>13}  {contract}"))
    entries.sort(key=lambda entry: entry[0])
    return "\n".join(lines + [line for _, line in entries])


def table_of_shares(submissions: dict[int, Curve], baselines: list[dict]) -> str:
    """The shares at some KLs of the baselines and the submissions; empty if there are none."""
    rows = list(baselines)
    for number, curve in submissions.items():
        name = number_and_name(number, curve)
        rows += [{**row, "method": name} for row in curve.finished()]
    text = tables.table_of_shares(rows)
    return text if "\n" in text else ""    # one line is the header alone


# --------------------------------------------------------------------------------------- drawing
def free_place(point: tuple[float, float], width: float, taken: list[tuple], size: tuple
               ) -> tuple[float, float]:
    """The centre of the free place for a text of this width that is nearest to a point.

    All lengths are in points (1/72 inch). `taken` has the centre, width and height of what must
    not be covered; the place is within axes of this `size`. If none is free, it is the point.
    """
    x, y, widths, heights = numpy.array(taken).T
    angles = numpy.radians(numpy.arange(45, 405, 15))    # upper right first
    for radius in range(6, 150, 2):
        for angle in angles:
            centre_x = point[0] + (radius + width / 2) * numpy.cos(angle)
            centre_y = point[1] + radius * numpy.sin(angle)
            is_inside = (width / 2 < centre_x < size[0] - width / 2
                         and NUMBER_SIZE / 2 < centre_y < size[1] - NUMBER_SIZE / 2)
            covered = ((abs(x - centre_x) < (widths + width) / 2)
                       & (abs(y - centre_y) < (heights + NUMBER_SIZE) / 2))
            if is_inside and not covered.any():
                return centre_x, centre_y
    return point


def in_points(axis, kl: float, reward: float) -> tuple[float, float]:
    """A place in the axes, in points (1/72 inch) from their lower left corner."""
    pixels = axis.transData.transform((kl, reward)) - axis.bbox.min
    return tuple(pixels * 72 / axis.figure.dpi)


def boxes_of(axis, row: dict) -> list[tuple[float, float, float, float]]:
    """Centre, width and height, in points, of a policy's marker and of its two error bars."""
    kl, reward = min(row["kl"], axis.get_xlim()[1]), row["reward"]
    x, y = in_points(axis, kl, reward)
    right, top = in_points(axis, kl + row["kl_se"], reward + row["reward_se"])
    return [(x, y, STUDENT_SIZE, STUDENT_SIZE), (x, y, 2 * (right - x), 1.),
            (x, y, 1., 2 * (top - y))]


def write_beside(axis, texts: list[tuple[float, float, str]], rows: list[dict],
                 optimum: dict) -> None:
    """Write each text (KL, reward, text) near its point; it covers no other, policy or optimum."""
    size = tuple(axis.bbox.size * 72 / axis.figure.dpi)
    taken = [box for row in rows for box in boxes_of(axis, row)]
    taken += [(*in_points(axis, *point), 3., 3.) for point in zip(optimum["kl"], optimum["reward"])]
    for kl, reward, text in sorted(texts):
        point = in_points(axis, kl, reward)
        width = .65 * NUMBER_SIZE * len(text) + 2
        place = free_place(point, width, taken, size)
        taken.append((*place, width, NUMBER_SIZE))
        axis.annotate(text, (kl, reward), (place[0] - point[0], place[1] - point[1]),
                      textcoords="offset points", ha="center", va="center", fontsize=NUMBER_SIZE,
                      zorder=6, arrowprops={"arrowstyle": "-", "lw": .5, "color": "0.4",
                                            "shrinkA": 0, "shrinkB": 2})


def texts_of(rows: list[dict], name: str, right: float, is_named: bool) -> list[tuple]:
    """KL, reward and text beside each policy: its name, with its KL if it is beyond `right`."""
    texts = []
    for row in rows:
        if row["kl"] > right:
            texts.append((right, row["reward"], f"{name}, KL {row['kl']:.0f} \u2192"))
        elif is_named:
            texts.append((row["kl"], row["reward"], name))
    return texts


def stretch(kl: numpy.ndarray) -> numpy.ndarray:
    """The horizontal place of a KL: a square root, because many policies have a small KL."""
    return numpy.sqrt(numpy.maximum(kl + .1, 0.))    # the .1 hides the noise of a KL near 0


def unstretch(x: numpy.ndarray) -> numpy.ndarray:
    """The KL at a place."""
    return x ** 2 - .1


def draw(submissions: dict[int, Curve], baselines: list[dict], optimum: dict,
         path: pathlib.Path) -> None:
    """Draw the finished policies under the optimum; the numbers are those of the table."""
    figure, axis = plt.subplots(figsize=(10.5, 6.3))
    students = [row for curve in submissions.values() for row in curve.finished()]
    rows = baselines + students
    right = min(frontier.MAX_KL, 1.04 * max(row["kl"] for row in rows))
    bottom = min(row["reward"] for row in rows)
    frontier.draw_optimum(axis, optimum)
    axis.set_xscale("function", functions=(stretch, unstretch))
    axis.set(xlim=(-.03, right), ylim=(min(.45, bottom - .03), 1.02))
    texts = []
    for number, curve in submissions.items():
        texts += texts_of(curve.finished(), str(number), right, is_named=True)
    frontier.draw_markers(axis, students, ("submission", *USER_STYLE[0]), right, ms=STUDENT_SIZE,
                          **LINES)
    for method, style in STYLE.items():
        of_method = [row for row in baselines if row["method"] == method]
        if of_method:
            size = SFT_SIZE if method == "sft" else BASELINE_SIZE
            frontier.draw_markers(axis, of_method, style, right, ms=size, **LINES)
            texts += texts_of(of_method, style[0], right, is_named=False)
    axis.set_xlabel("sequence KL(\u03c0 \u2016 \u03c0_ref), nats; square-root scale", fontsize=12)
    axis.set_ylabel("true reward (probability of positive sentiment)", fontsize=12)
    axis.grid(alpha=.25)
    axis.legend(loc="center left", bbox_to_anchor=(1.01, .5), fontsize=10, frameon=False)
    count = "1 submission" if len(submissions) == 1 else f"{len(submissions)} submissions"
    axis.set_title(f"{count} under the optimum of the baselines' run; numbers as in the table; "
                   "error bars are standard errors over prompts", fontsize=10, loc="left")
    figure.tight_layout()    # before the places of the texts are measured
    write_beside(axis, texts, rows, optimum)
    save(figure, path)


def draw_class(folders: list[pathlib.Path], path: pathlib.Path) -> str:
    """Draw the policies of all submissions; returns the tables. Raises OSError or ValueError."""
    curves = read_curves(folders)
    submitted = [curve for curve in curves if not curve.is_baselines]
    submissions = dict(enumerate(submitted, start=1))
    baselines = [row for curve in curves if curve.is_baselines for row in curve.finished()
                 if row["method"] in STYLE]
    optimum = next(curve.optimum for curve in submitted if curve.rows)
    draw(submissions, baselines, optimum, path)
    both = [table(submissions, baselines), table_of_shares(submissions, baselines)]
    return "\n\n".join(text for text in both if text)
