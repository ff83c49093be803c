"""
Shared by the course's tests: the project as it is handed out, true values, and child.py in a fork of this process,
which has imported torch already. The sandbox itself is tested on a toy set.
"""

import json
import os
import signal
import sys

import pytest
import torch
from course_variants import COURSE, ROOT

sys.path[:0] = [str(COURSE), str(COURSE / "sets")]

import child  # noqa: E402
import draw  # noqa: E402
import make  # noqa: E402

torch.optim.AdamW([torch.zeros(1, requires_grad=True)])  # imports half of torch, once


def in_child(folder, request):
    """Forget the project's modules, and answer as child.py does."""
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None) or "").startswith(str(ROOT)):
            del sys.modules[name]
    sys.path[:] = [path for path in sys.path if not path.startswith(str(ROOT))]
    os.chdir(folder)
    torch.set_num_threads(1)
    return json.dumps(child.answers(folder, json.loads(request))).encode()


def forked(folder, request, seconds):
    """The text that child.py would write, "" if it ended before."""
    read, write = os.pipe()
    number = os.fork()
    if number == 0:
        signal.alarm(seconds)
        try:
            with os.fdopen(write, "wb") as file:
                file.write(in_child(folder, request))
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as file:
        text = file.read().decode()
    os.waitpid(number, 0)
    return text


@pytest.fixture(scope="session")
def run():
    return forked


@pytest.fixture(scope="session")
def project():
    return make.whole_project()


@pytest.fixture(scope="session")
def true_values():
    """A function of the number of a set: {key: cases and expected values}."""
    made = {}

    def of_set(number):
        if number not in made:
            made[number] = json.loads(json.dumps(draw.expected(number, "test")))
        return made[number]
    return of_set
