"""The figures: one module each, `measure` what training did not, `draw` from results alone. Shared: names, colours, files."""
import json
import pathlib
import sys

import matplotlib

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
}
STUDENTS = [("#CC79A7", "P"), ("#8C564B", "X"), ("#999933", "h"), ("#7F3FBF", "p"), ("#B22222", "<"), ("#2F4F4F", ">"),
            ("#DAA520", "d")]


def style(methods) -> dict[str, tuple[str, str, str]]:
    """Legend, colour and marker of each method: the paper's are always the same, students' losses take the next free ones."""
    new = sorted(set(methods) - set(STYLE))
    return {**STYLE, **{name: (name, *STUDENTS[i % len(STUDENTS)]) for i, name in enumerate(new)}}


def load(folder) -> tuple[list[dict], dict]:
    """results.jsonl and optimum.json of a run's folder."""
    folder = pathlib.Path(folder)
    rows = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    return rows, json.loads((folder / "optimum.json").read_text())


def redraw(draw, name: str) -> None:
    """`python -m plots.NAME [FOLDER]`: draw FOLDER/NAME.png (default plots/, the published results) again, without training."""
    folder = pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else HERE
    try:
        rows, optimum = load(folder)
    except (OSError, ValueError) as error:
        sys.exit(f"cannot read the results in {folder} ({error}): name a folder with results.jsonl and optimum.json, "
                 "such as runs/default")
    draw(rows, optimum, folder / f"{name}.png")
    print(folder / f"{name}.png")
