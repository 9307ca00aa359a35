"""The archive that Gradescope's autograder wants: setup.sh, run_autograder, and this repository.

Upload it under "Configure autograder", with Ubuntu 22.04 or newer as the base image. Choose a
container with 3 GB of memory (1.5 GB with WORKERS = 1 in points.py), since the smallest one has
less, and a time limit of 40 minutes. Setup installs the packages and trains the baselines once,
which takes 10 to 30 minutes.
"""
import pathlib
import zipfile

import sandbox

SETUP = """#!/usr/bin/env bash
set -e
apt-get update
apt-get install -y python3.11 python3.11-venv || apt-get install -y python3 python3-venv
python=$(command -v python3.11 || command -v python3)
"$python" -m venv /autograder/venv
/autograder/venv/bin/pip install --extra-index-url https://download.pytorch.org/whl/cpu \\
    -r /autograder/source/requirements.txt
id student || useradd --no-create-home student
cd /autograder/source
/autograder/venv/bin/python -m tests.grade --prepare
"""
RUN = """#!/usr/bin/env bash
cd /autograder/source
{variables}/autograder/venv/bin/python -m tests.grade /autograder/submission \\
    --out /autograder/results/results.json \\
    --metadata /autograder/submission_metadata.json --user student
"""
BUGS = "private_bugs"    # the teacher's file in the archive; its ending is kept


def pack(folder: pathlib.Path, bugs: str = "") -> pathlib.Path:
    """Write autograder.zip into a folder, with a file of private bugs if there is one."""
    files = sandbox.take_snapshot()
    variables = ""
    if bugs:
        name = BUGS + pathlib.Path(bugs).suffix
        files[name] = pathlib.Path(bugs).read_bytes()
        variables = f"DPO_BUGS=/autograder/source/{name} "
    files["setup.sh"] = SETUP.encode()
    files["run_autograder"] = RUN.format(variables=variables).encode()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "autograder.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            entry = zipfile.ZipInfo(name)
            is_program = name in ("setup.sh", "run_autograder")
            entry.external_attr = (0o755 if is_program else 0o644) << 16
            archive.writestr(entry, content, zipfile.ZIP_DEFLATED)
    return path
