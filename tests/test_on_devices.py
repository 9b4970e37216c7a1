"""The tests on a second device, in a process of their own: PyTorch believes in an accelerator there."""

import os

from conftest import ROOT, run


def test_everything_on_a_second_device():
    path = os.pathsep.join([str(ROOT / "tests"), str(ROOT / "tests" / "device")])
    done = run("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/device", cwd=ROOT, timeout=900, PYTHONPATH=path)
    assert done.returncode == 0, done.stdout[-3000:]
