"""Servers of the sandbox do not outlive the process that started them."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import time
import warnings

import pytest

from tests.operator_support import ROOT
from tests.sandbox.process import ServerProcess, ServerStartError

PARENT = """
import sys, time
from pathlib import Path
from tests.sandbox.process import ServerProcess
server = ServerProcess([sys.executable, "-c", "import time; time.sleep(600)"], Path(sys.argv[1])).start()
print(server.pid, flush=True)
time.sleep(600)
"""


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGHUP])
def test_a_killed_parent_takes_its_server_along(tmp_path, number):
    words = [sys.executable, "-c", PARENT, str(tmp_path / "log")]
    parent = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    server = int(parent.stdout.readline())
    assert alive(server)
    parent.send_signal(number)
    parent.communicate()
    deadline = time.monotonic() + 60
    while alive(server) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(server)


def test_stopped_and_started_again(tmp_path):
    server = ServerProcess([sys.executable, "-c", "import time; time.sleep(600)"], tmp_path / "log")
    first = server.start().pid
    server.stop()
    assert not alive(first)
    second = server.start().pid
    assert alive(second)
    server.kill()
    assert not server.running


@pytest.mark.filterwarnings("error::ResourceWarning")
@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_a_server_that_exits_at_its_start_leaves_no_watchdog(tmp_path):
    """A restarted AutoMem refuses to start if the size does not match."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gc.collect()  # what other tests of this process left open
    server = ServerProcess([sys.executable, "-c", "raise SystemExit(3)"], tmp_path / "log")
    with pytest.raises(ServerStartError, match="exited with 3"):
        server.start().wait_ready(lambda: False)
    del server
    gc.collect()
