"""What the processes of tiny.py do. Imported by their server, so that each of them starts with torch loaded."""

import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402

import train  # noqa: E402

torch.optim.AdamW([torch.zeros(1)])  # imports half of torch at first use


def work(log, arguments, die_at, environment):
    torch.set_num_threads(1)
    os.environ.update(environment)
    sys.stdout = sys.stderr = open(log, "a", buffering=1)
    if die_at is not None:
        real, writes = os.fsync, []

        def fsync(handle):
            writes.append(handle)
            if len(writes) == die_at:
                os.ftruncate(handle, os.fstat(handle).st_size // 2)
                os.kill(os.getpid(), signal.SIGKILL)
            real(handle)

        os.fsync = fsync
    train.main(arguments)
