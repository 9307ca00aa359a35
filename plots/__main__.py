"""Draw all figures of a folder from its results.

    python -m plots [FOLDER]        default: plots/, the published run
"""
import pathlib
import sys

from plots import PUBLISHED
from plots.figures import draw_all

folder = pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else PUBLISHED
try:
    names = draw_all(folder)
except (OSError, ValueError, KeyError) as error:
    sys.exit(f"cannot read the results in {folder} ({error}): name a folder with results.jsonl and "
             "optimum.json, such as runs/default")
print(f"drawn in {folder}: {', '.join(names)}")
