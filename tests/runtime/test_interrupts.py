"""Signals that end a run: they are remembered, agreed on, and handled for no longer than the run."""

from __future__ import annotations

import signal

import torch

from runtime.interrupts import SIGNALS, Interrupts, leave_to_parent

# The second of two processes gets a signal before step 13. The steps at which `agreed` returns True are printed.
AGREEING = """
import signal, torch
from runtime import processes
from runtime.interrupts import Interrupts

device = processes.start("cpu")
with Interrupts(device) as interrupts:
    agreed = []
    for step in range(1, 31):
        if step == 13 and processes.rank() == 1:
            signal.raise_signal(signal.SIGTERM)
        if interrupts.agreed(step):
            agreed.append(step)
    print(agreed, interrupts.agreed(), interrupts.received)
processes.stop()
"""


def test_processes_agree_at_every_tenth_step_or_when_no_step_is_given(tmp_path, ranks):
    result = ranks(tmp_path, AGREEING)
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"[20, 30] True None\n[20, 30] True {signal.SIGTERM}\n"


def test_one_process_agrees_with_itself_at_any_step():
    with Interrupts(torch.device("cpu")) as interrupts:
        assert not interrupts.agreed(7) and not interrupts.agreed()
        signal.raise_signal(signal.SIGUSR1)
        assert interrupts.agreed(7) and interrupts.agreed() and interrupts.received is signal.SIGUSR1


def test_the_callers_handler_is_put_back():
    def mine(number: int, frame: object) -> None:
        raise AssertionError("this run's signals are not the caller's")

    before = signal.signal(signal.SIGUSR1, mine)
    try:
        with Interrupts(torch.device("cpu")) as interrupts:
            signal.raise_signal(signal.SIGUSR1)
        assert interrupts.received is signal.SIGUSR1 and signal.getsignal(signal.SIGUSR1) is mine
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_a_second_signal_ends_at_once(start, tmp_path):
    script = (
        "import signal, time, torch\n"
        "from runtime.interrupts import SAME_SIGNAL, Interrupts\n"
        "with Interrupts(torch.device('cpu')) as interrupts:\n"
        "    signal.raise_signal(signal.SIGTERM)\n"
        "    signal.raise_signal(signal.SIGTERM)  # as torchrun does with a signal that all have got\n"
        "    print(interrupts.agreed(), interrupts.received.name, flush=True)\n"
        "    time.sleep(SAME_SIGNAL + 0.1)\n"
        "    signal.raise_signal(signal.SIGUSR1)\n"
        "    print('still here')\n"
    )
    result = start(tmp_path, script).result()
    assert result.returncode == -signal.SIGUSR1 and result.stdout == "True SIGTERM\n"


def test_a_loaders_process_outlives_what_is_sent_to_all():
    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        leave_to_parent(0)
        for number in SIGNALS:
            assert signal.getsignal(number) is signal.SIG_IGN
            signal.raise_signal(number)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
