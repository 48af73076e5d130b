"""What imports many packages ends at once on Ctrl-C, and is left out of garbage collection."""

import subprocess
import sys

HEAVY = """
import gc, os, signal
from dipaco.imports import heavy_imports
before = signal.getsignal(signal.SIGINT)  # a shell's background jobs begin with it ignored
with heavy_imports():
    {body}
assert gc.isenabled() and gc.get_freeze_count() > 0
assert signal.getsignal(signal.SIGINT) is before
print("done")
"""


def run(body: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", HEAVY.format(body=body)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_ctrl_c_while_packages_load_is_no_exception() -> None:
    done = run("os.kill(os.getpid(), signal.SIGINT); import numpy")
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_what_was_imported_is_not_collected() -> None:
    done = run("assert not gc.isenabled()")
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr
