"""One thread: the tests' tensors are too small to share."""
import sys

import torch

torch.set_num_threads(1)


def pytest_terminal_summary(terminalreporter):
    """The table of planted bugs and the theorem that caught each."""
    table = getattr(sys.modules.get("test_mutants"), "TABLE", [])
    if table:
        terminalreporter.section(f"{sum(bool(caught) for _, caught in table)} of {len(table)} planted bugs caught")
    for mutant, caught in table:
        theorem = caught[0].replace("_", " ") if caught else "SURVIVES"
        terminalreporter.write_line(f"{mutant.name.replace('_', ' '):<37} {mutant.target:<25} {theorem}")
