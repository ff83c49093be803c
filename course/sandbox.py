"""
Run a command that is not trusted: without privileges, in a folder of its own, with limits, its output out of the way.

As root the process becomes the user UID, which owns nothing but its folder; our source folder is closed to it. Without
root there are the limits alone. What is printed is cut by the limit of file sizes and not shown.
"""

import functools
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

UID = 48_000 + os.getpid() % 10_000  # no user of the system: `runuser` would need an entry in /etc/passwd
MEMORY = 480 * 2 ** 20  # private memory of a process; torch takes 300 MB of it
FILE = 4 * 2 ** 20


def limits(seconds):
    """Applied in the child, before the command."""
    def apply():
        for name, value in ((resource.RLIMIT_CPU, seconds), (resource.RLIMIT_DATA, MEMORY),
                            (resource.RLIMIT_AS, 4 * MEMORY), (resource.RLIMIT_FSIZE, FILE),
                            (resource.RLIMIT_CORE, 0), (resource.RLIMIT_NOFILE, 256)):
            resource.setrlimit(name, (value, value))
        if os.getuid() == UID:  # processes are counted by user
            resource.setrlimit(resource.RLIMIT_NPROC, (16, 16))
        os.umask(0o077)
        try:  # if memory ends, this process is to go, not the grader
            with open("/proc/self/oom_score_adj", "w") as file:
                file.write("1000")
        except OSError:
            pass
    return apply


def processes():
    """The processes of the user UID, by number."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if entry.stat().st_uid == UID:
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def end(process):
    """Kill a process, its group, and whatever else the user has started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except OSError:
        pass
    process.wait()
    for _ in range(100 if os.getuid() == 0 else 0):
        left = processes()
        for number in left:
            try:
                os.kill(number, signal.SIGKILL)
            except OSError:
                pass
        if not left:
            break
        time.sleep(0.05)


class Folder:
    """A temporary folder that belongs to the user UID; removed at the end."""

    def __init__(self, base=None):
        self.path = tempfile.mkdtemp(prefix="graded-", dir=base)

    def hand_over(self):
        if os.getuid() == 0:
            for folder, _, names in os.walk(self.path):
                os.chown(folder, UID, UID)
                for name in names:
                    os.chown(os.path.join(folder, name), UID, UID, follow_symlinks=False)

    def __enter__(self):
        return self

    def __exit__(self, *fault):
        shutil.rmtree(self.path, ignore_errors=True)


def environment(folder):
    return dict(PATH="/usr/local/bin:/usr/bin:/bin", HOME=folder, TMPDIR=folder, LANG="C.UTF-8",
                PYTHONDONTWRITEBYTECODE="1", PYTEST_DISABLE_PLUGIN_AUTOLOAD="1",
                PYTHONHASHSEED="0", OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")


def start(command, folder, seconds, stdin, stdout, descriptors=()):
    as_user = dict(user=UID, group=UID, extra_groups=[]) if os.getuid() == 0 else {}
    return subprocess.Popen(command, cwd=folder, env=environment(folder), stdin=stdin, stdout=stdout,
                            stderr=subprocess.STDOUT, pass_fds=descriptors, start_new_session=True,
                            preexec_fn=limits(seconds), **as_user)


def run(command, folder, seconds, request="", descriptor=True):
    """
    Run [*command, descriptor] in a folder. Returns (exit status, what was written to the descriptor).

    The status is "time" when it took longer than `seconds`. The descriptor is a file that only the parent can name.
    """
    with tempfile.TemporaryFile() as results, tempfile.TemporaryFile() as printed, tempfile.TemporaryFile() as stdin:
        stdin.write(request.encode())
        stdin.seek(0)
        full = [*command, str(results.fileno())] if descriptor else command
        process = start(full, folder, seconds, stdin, printed, [results.fileno()])
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            status = "time"
        end(process)
        results.seek(0)
        return status, results.read(FILE).decode("utf-8", "replace")


LAUNCH = """import runpy, sys
sys.path += sys.argv[1].split(":")
sys.argv = sys.argv[2:]
if sys.argv[0] == "-m":
    runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
else:
    runpy.run_path(sys.argv[0], None, "__main__")
"""


@functools.cache
def python():
    """
    The command that runs a Python script, or -m module, as the user UID.

    If this interpreter lies in a closed folder, as one of root's own, the system's python of the same version takes the
    packages of this one. Raises RuntimeError if there is none.
    """
    site = [path for path in sys.path if path.endswith("site-packages")]
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    for command in ([sys.executable, "-I"], [f"/usr/bin/{version}", "-I", "-c", LAUNCH, ":".join(site)],
                    [f"/usr/local/bin/{version}", "-I", "-c", LAUNCH, ":".join(site)]):
        try:
            as_user = dict(user=UID, group=UID, extra_groups=[]) if os.getuid() == 0 else {}
            done = subprocess.run([*command[:2], "-c", "pass"], cwd="/", env=environment("/"), **as_user)
            if done.returncode == 0:
                return command
        except OSError:
            continue
    raise RuntimeError(f"{sys.executable} cannot be run without privileges: make the venv with /usr/bin/python3")
