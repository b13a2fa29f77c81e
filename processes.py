"""Several processes as one program, and signals that end it in order.

`torchrun` starts the same script several times; here they join, agree on errors, and speak with one voice. Nothing
here knows of models: train.py's loop wraps them in DistributedDataParallel itself.
"""

import os
import signal
import sys

import torch
import torch.distributed as dist
from tqdm import tqdm

from files import InputError


def ranks():
    """(rank, number of processes)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def from_all_ranks(part):
    """[every process's object], in rank order."""
    if ranks()[1] == 1:
        return [part]
    parts = [None] * ranks()[1]
    dist.all_gather_object(parts, part)
    return parts


def say(text):
    """Print, once per run, without tearing a progress bar."""
    if ranks()[0] == 0:
        tqdm.write(text)
        sys.stdout.flush()


def accelerator():
    """-> torch.device: this process's GPU if there is one, else the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.set_device(device)
    torch.set_float32_matmul_precision("high")  # TF32 for what bf16 does not cover
    return device


def start(args):
    """Join the other processes if torchrun started any, choose the device. -> torch.device."""
    device = accelerator()
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    args.precision = args.precision or ("bf16" if device.type == "cuda" else "float32")
    return device


def on_all_ranks(function, *arguments):
    """[every process's result], in rank order.

    An InputError of one is an error of all: no process waits for one that has ended, and rank 0 tells it.
    """
    try:
        mine = function(*arguments), None
    except InputError as error:
        mine = None, str(error)
    results, errors = zip(*from_all_ranks(mine))
    if any(errors):
        raise InputError(next(filter(None, errors))) if ranks()[0] == 0 else SystemExit(1)
    return results


def on_signals(handler):
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handler)


def interrupt(number, frame=None):
    """End the run at once: `main` says so."""
    raise KeyboardInterrupt(number)


class Stop:
    """Ctrl-C and SIGTERM end the run after the current training step; outside of one, and the second time, at once."""

    def __init__(self):
        self.number, self.requested = signal.SIGTERM, False  # the number stays where another process got the signal
        self.in_step = True
        on_signals(self.request)

    def request(self, number, frame):
        if self.requested or not self.in_step:
            interrupt(number)
        self.number, self.requested = number, True

    def leave_step(self):
        """From here on at once, also for a signal that came after the last step had asked."""
        self.in_step = False
        if self.requested:
            interrupt(self.number)
