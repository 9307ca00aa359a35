"""Draw every figure of a run's folder again, from its results alone.     python -m plots [FOLDER, default plots/: the published run]"""
import pathlib
import sys

from plots import HERE
from plots.results import draw_all

folder = pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else HERE
try:
    print(f"drawn in {folder}: {', '.join(draw_all(folder))}")
except (OSError, ValueError, KeyError) as error:
    sys.exit(f"cannot read the results in {folder} ({error}): name a folder with results.jsonl and optimum.json, such as runs/default")
