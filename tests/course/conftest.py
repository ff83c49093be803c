"""
Shared by the course's tests: the project as it is handed out, true values, and child.py in a fork of this process,
which has imported torch already. The sandbox itself is tested on a toy set.
"""

import functools
import json
import multiprocessing
import os
import signal
import sys
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch
from course_variants import COURSE, ROOT

sys.path[:0] = [str(COURSE), str(COURSE / "sets")]

import child  # noqa: E402
import draw  # noqa: E402
import make  # noqa: E402

torch.optim.AdamW([torch.zeros(1, requires_grad=True)])  # imports half of torch, once


def in_child(folder, request, seconds):
    """Forget the project's modules, and answer as child.py does."""
    signal.alarm(seconds)
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None) or "").startswith(str(ROOT)):
            del sys.modules[name]
    sys.path[:] = [path for path in sys.path if not path.startswith(str(ROOT))]
    os.chdir(folder)
    torch.set_num_threads(1)
    return json.dumps(child.answers(folder, json.loads(request)))


@pytest.fixture(scope="session")
def run():
    """A function of folder, request and seconds: the text that child.py would write."""
    def forked(folder, request, seconds):
        with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as pool:
            return pool.submit(in_child, folder, request, seconds).result()
    return forked


@pytest.fixture(scope="session")
def project():
    return make.whole_project()


@pytest.fixture(scope="session")
def true_values():
    """A function of the number of a set: {key: cases and expected values}."""
    return functools.cache(lambda number: json.loads(json.dumps(draw.expected(number, "test"))))
