"""A group that is killed or hangs: noticed, named, started again, and the video is the one of an undisturbed run."""

import os
import signal
import threading
import time

import psutil
import pytest

from parallel_backend.devices import Devices
from parallel_backend.errors import GroupError
from parallel_backend.group.client import GroupExecutor
from parallel_backend.plans import Plan

from .conftest import TOLERANCE, rank_processes, wait_until

SLOW = {"size": (240, 160, 17), "steps": 40}
"""Steps that take long enough for a signal to come in the middle of one, and for the state to be kept."""


@pytest.fixture(scope="module")
def group():
    """A group of two that every test disturbs."""
    executor = GroupExecutor(Plan.parse("cfg2"), Devices("cpu", (0, 1)))
    yield executor
    executor.close()


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("scheduler", ["ddim", "dpm"])
def test_a_lost_job_goes_on_from_its_last_kept_step(how, rank, scheduler, group, make_job, local, caplog):
    job = make_job("5b", scheduler=scheduler, **SLOW)
    expected = local.sample(job).tensor
    steps, hurt = [], []

    def hurt_once(step: int, total: int) -> None:
        steps.append(step)
        if step == 25 and not hurt:
            hurt.append(time.monotonic())
            os.kill(rank_processes(group.address)[rank], how)
        elif len(hurt) == 1:
            hurt.append(time.monotonic())

    result = group.sample(job, on_step=hurt_once)
    assert (result.tensor - expected).abs().max() <= TOLERANCE
    again = steps[steps.index(25) + 1]
    assert 1 < again <= 26, "it goes on from a kept step"
    word = {signal.SIGKILL: "was killed by SIGKILL", signal.SIGSTOP: "was stopped (SIGSTOP) while on step"}[how]
    assert any(f"rank {rank} {word}" in note for note in result.report.notes)
    assert "starting the group again" in caplog.text
