"""Stages that two workers share (harness.py)."""
import time
from concurrent.futures import ThreadPoolExecutor

import torch

import harness
import train


@harness.cached
def slow_stage(setup) -> int:
    time.sleep(.6)
    return 1


@harness.cached
def stage_that_reads_it(setup) -> int:
    return slow_stage(setup) + 1


def test_waiting_for_another_worker_is_no_part_of_the_seconds_of_a_stage(tmp_path):
    """One worker computes a slow stage; the other computes a quick one that has to wait for it."""
    store = torch.distributed.HashStore()
    workers = [harness.Stages(tmp_path, store) for _ in range(2)]
    slow, quick = (train.Setup(train.Config(), 0, stages, "cpu", "", None, None, None)
                   for stages in workers)
    for function in (slow_stage, stage_that_reads_it):
        assert harness.Stage(function, slow).path    # reads their code, which takes a while once
    with ThreadPoolExecutor() as pool:
        # not slow_stage(slow): up to Python 3.11 a cached property blocks other threads
        computed = pool.submit(workers[0].get, harness.Stage(slow_stage, slow))
        time.sleep(.2)    # until the first worker has claimed its stage
        value = stage_that_reads_it(quick)
    assert (computed.result(), value) == (1, 2)
    assert workers[0].seconds["slow-stage-seed0"] > .5
    assert workers[1].seconds["stage-that-reads-it-seed0"] < .3
