"""Draw all figures of a folder from its results.

    python -m plots [FOLDER]        default: plots/, the published run
    python -m plots class FOLDER... [--out FILE.png]        graded submissions on one frontier
"""
import pathlib
import sys

from plots import PUBLISHED
from plots.class_frontier import draw_class
from plots.figures import draw_all


def main(words: list[str]) -> None:
    """Draw the figures of a folder, or of a class."""
    if words[:1] == ["class"]:
        path = pathlib.Path("class.png")
        if len(words) > 2 and words[-2] == "--out":
            path = pathlib.Path(words[-1])
            words = words[:-2]
        try:
            print(draw_class([pathlib.Path(word) for word in words[1:]], path))
        except (OSError, ValueError, KeyError) as error:
            sys.exit(f"cannot draw the class ({error}): name folders that python -m tests.grade "
                     "has graded")
        print(f"drawn: {path}")
        return
    folder = pathlib.Path(words[0]) if words else PUBLISHED
    try:
        names = draw_all(folder)
    except (OSError, ValueError, KeyError) as error:
        sys.exit(f"cannot read the results in {folder} ({error}): name a folder with results.jsonl "
                 "and optimum.json, such as runs/default")
    print(f"drawn in {folder}: {', '.join(names)}")


if __name__ == "__main__":
    main(sys.argv[1:])
