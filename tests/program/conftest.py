"""The tiny experiment, run once for all tests of the program."""
import pytest
from tiny_run import run


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """The folder of a finished run of two workers, and what the run printed."""
    out = tmp_path_factory.mktemp("tiny") / "run"
    code, printed = run(out, "--workers", 2)
    assert code == 0, printed
    return out, printed
