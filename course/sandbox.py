"""
Run a command that is not trusted: without privileges, in its own folder, with limits, and without a trace afterwards.
As root the process becomes the user UID, who owns nothing but its folder. Without root there are the limits alone.
"""

import contextlib
import functools
import os
import resource
import signal
import subprocess
import sys
import tempfile

UID = 48_000 + os.getpid() % 10_000  # no user of the system: `runuser` would need an entry in /etc/passwd
MEMORY = 480 * 2 ** 20               # private memory of a process; torch takes 300 MB of it
FILE = 4 * 2 ** 20
SHARED = ("/tmp", "/var/tmp", "/dev/shm", "/dev/mqueue", "/run/lock")  # where everybody may write


def is_root():
    return os.getuid() == 0


def limits(seconds):
    """Applied in the child, before the command."""
    def apply():
        # the clock of the grader should be first, because it can tell why: two seconds more of processor time
        for name, value in ((resource.RLIMIT_CPU, seconds + 2), (resource.RLIMIT_DATA, MEMORY),
                            (resource.RLIMIT_AS, 4 * MEMORY), (resource.RLIMIT_FSIZE, FILE),
                            (resource.RLIMIT_CORE, 0), (resource.RLIMIT_NOFILE, 256)):
            hard = resource.getrlimit(name)[1]  # without privileges no limit can be raised
            value = value if hard == resource.RLIM_INFINITY else min(value, hard)
            resource.setrlimit(name, (value, value))
        if os.getuid() == UID:  # processes are counted by user
            resource.setrlimit(resource.RLIMIT_NPROC, (16, 16))
        os.umask(0o077)
    return apply


def clean():
    """End whatever the user UID has started, and remove its shared memory and its files where everybody may write."""
    if is_root():
        for command in (["/bin/sh", "-c", "kill -9 -1"], ["ipcrm", "-a"]):
            subprocess.run(command, stderr=subprocess.DEVNULL, cwd="/", **as_user())
        theirs = ["-user", str(UID), "-prune", "-exec", "rm", "-rf", "{}", "+"]
        closed = ["-type", "d", "!", "-perm", "-o+w", "-prune"]  # nothing of theirs can be in there
        subprocess.run(["find", *SHARED, *theirs, "-o", *closed], stderr=subprocess.DEVNULL)


def hand_over(folder):
    """Give a folder and all in it to the user UID."""
    for place, _, names in os.walk(folder) if is_root() else ():
        for path in (place, *(os.path.join(place, name) for name in names)):
            os.chown(path, UID, UID, follow_symlinks=False)


def as_user():
    return dict(user=UID, group=UID, extra_groups=[]) if is_root() else {}


@functools.cache
def python():
    """
    (an interpreter that the user UID can run, folders of packages that it needs to be told). Raises RuntimeError if
    none can import torch without privileges.
    """
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    packages = [path for path in sys.path if path.endswith("site-packages")]
    for command, told in ((sys.executable, []), (f"/usr/bin/{version}", packages)):
        try:
            if subprocess.run([command, "-s", "-c", "import torch"], cwd="/", env={"PYTHONPATH": ":".join(told)},
                              stderr=subprocess.DEVNULL, **as_user()).returncode == 0:
                return command, told
        except OSError:
            continue
    raise RuntimeError(f"{sys.executable} cannot import torch without privileges, so no student's code could run: make "
                       f"the venv in a folder that everybody may read, with /usr/bin/python3")


def start(command, folder, seconds, **streams):
    """Start Python with these arguments as the user UID, in a folder that now belongs to it."""
    hand_over(folder)
    interpreter, told = python()
    variables = dict(PATH="/usr/local/bin:/usr/bin:/bin", HOME=folder, TMPDIR=folder, LANG="C.UTF-8",
                     PYTHONDONTWRITEBYTECODE="1", PYTEST_DISABLE_PLUGIN_AUTOLOAD="1", PYTHONHASHSEED="0",
                     PYTHONPATH=":".join(told), OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")
    process = subprocess.Popen([interpreter, "-s", *command], cwd=folder, env=variables, start_new_session=True,
                               stderr=subprocess.DEVNULL, preexec_fn=limits(seconds), **streams, **as_user())
    with contextlib.suppress(OSError), open(f"/proc/{process.pid}/oom_score_adj", "w") as file:
        file.write("1000")  # if memory ends, this process is to go, not the grader
    return process


def finish(process):
    """End a process, its group and whatever else it has left."""
    with contextlib.suppress(OSError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    clean()


def run_status(command, folder, seconds, request=""):
    """(exit status, what was written to the standard output). Raises TimeoutError after so many seconds."""
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as stdin:
        stdin.write(request.encode())
        stdin.seek(0)
        process = start(command, folder, seconds, stdin=stdin, stdout=output)
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise TimeoutError from None
        finally:
            finish(process)
        output.seek(0)
        return status, output.read(FILE).decode("utf-8", "replace")


def run(folder, request, seconds):
    """The text that child.py writes."""
    return run_status([os.path.join(folder, "child.py"), folder], folder, seconds, request)[1]
