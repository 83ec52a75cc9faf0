"""How the table of bad inputs judges an answer, and what it says of memory."""

import os
import subprocess
import sys

import pytest

from benchmarks.bad_inputs.__main__ import fault_of
from benchmarks.bad_inputs.bench import Answer, PeakMemory, _below


@pytest.mark.parametrize(
    ("answer", "fault"),
    [
        (Answer("INVALID_ARGUMENT", field="dataset.path"), ""),
        (Answer("RESOURCE_EXHAUSTED"), ""),
        (Answer("exit 6"), ""),
        (Answer("INVALID_ARGUMENT"), "names no field"),
        (Answer("INTERNAL"), "INTERNAL"),
        (Answer("exit 1"), "exit 1"),
        (Answer(), "taken"),
    ],
)
def test_an_answer_that_blames_the_server_or_nothing_is_a_fault(answer: Answer, fault: str) -> None:
    assert fault_of(answer) == fault


def test_the_peak_of_a_process_is_kept_when_it_has_given_its_memory_back() -> None:
    code = "b = bytearray(200 << 20); del b; print(flush=True); input()"
    with PeakMemory(os.getpid(), without=set()) as peak:
        child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert child.stdout is not None
        child.stdout.readline()
        peak.sample()
        child.communicate(b"\n")
    assert 200 << 20 < peak.bytes < 400 << 20


def test_processes_that_do_not_count() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        # Tests that ran before in this process may have left helpers of multiprocessing behind.
        with PeakMemory(os.getpid(), without={child.pid, *_below(os.getpid())}) as peak:
            peak.sample()
        child.communicate(b"\n")
    assert peak.bytes == 0
