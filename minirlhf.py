"""
minirlhf: how a language model learns from human feedback, from the first line
to the last.

    python minirlhf.py                     all stages, minutes on two CPU cores
    python minirlhf.py --quick             the same, small, in under a minute
    python minirlhf.py --data pairs.jsonl  the same on your preference pairs
    python minirlhf.py --from runs/default --beta 0.05 --out runs/b
                                           another beta; equal stages are kept
    python minirlhf.py --compare runs/default runs/b      tables, side by side
    python minirlhf.py --prompt "i saw this little film with my sister ."
    python minirlhf.py --chat runs/default                talk to the policies
    python minirlhf.py --init FOLDER --lora 16 --data pairs.jsonl
                                           a pretrained model of Hugging Face

micro.py is all of it on one page. Read in this order: data.py, model.py,
sft.py, reward.py, ppo.py, grpo.py, dpo.py, mdp.py, lesson.py, estimators.py,
evaluate.py, then pipeline/stages.py, which puts them together. The same
command again continues where it stopped. docs/data.md has the forms of a pair.
"""

import os

# Threads of torch that wait for each other spin, which holds them all up next to another busy program. Let them sleep
# soon. This must be set before torch is imported; docs/speed.md has the effect.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # for GNU's OpenMP, about 0.1 ms
os.environ.setdefault("KMP_BLOCKTIME", "1")       # for Intel's and LLVM's, in ms

import contextlib
import re
import signal
import sys
import textwrap
import time
from pathlib import Path

import torch

from checks import CanaryError
from pipeline.config import parse_command
from pipeline.episode import chat, show_prompt
from pipeline.errors import BOLD, YELLOW, UserError, printable, styled
from pipeline.export import export
from pipeline.folder import begin, check_settings, finished, is_finished
from pipeline.page import compare
from pipeline.report import WIDTH, format_table
from pipeline.run import Run
from pipeline.stages import all_stages

CHAT = ("seed", "policies", "reward_from", "response_tokens", "temperature")  # options of a talk
SEEDS = dict(pretrain=0, sft=1, preferences=2, reward=3, report=5, robust=8)  # 1000 * seed + this; 4 of a policy


def run_stages(run):
    """Run the stages that are not done yet, one after another: a heading, a progress bar, the result in one line."""
    config, stages = run.config, all_stages(run.config)
    print(f"minirlhf  seed {config.seed}, {run.device}, torch {torch.__version__}, writing to {run.folder}")
    for number, (name, stage) in enumerate(stages.items(), 1):
        if run.has(stage.files):
            print(f"\n{number}/{len(stages)}  {name}: done")
            continue
        heading = "PPO once more, without the price of the KL." if name == "ppo_no_kl" else stage.run.__doc__
        heading = textwrap.fill(f"{number}/{len(stages)}  {name}: {heading}", WIDTH, subsequent_indent=5 * " ")
        print("\n" + styled(heading, BOLD), flush=True)
        seed = 1000 * config.seed + SEEDS.get(name, 4)
        torch.manual_seed(seed)  # a stage that runs alone gives what it gives after the others
        started = time.perf_counter()
        # no cache: it would keep the weights of before a step, and those that were read without a gradient
        with torch.autocast(run.device.type, torch.bfloat16, config.dtype == "bfloat16", cache_enabled=False):
            result = stage.run(run, name, seed)
        run.log(name, dict(stage_seconds=time.perf_counter() - started))
        run.remove(["checkpoint.pt"])
        for line in f"{result}  [{time.perf_counter() - started:.0f} s]".split("\n"):
            wrapped = textwrap.fill(line, WIDTH, initial_indent=5 * " ", subsequent_indent=7 * " ")
            print(styled(wrapped, YELLOW if line.startswith("warning: ") else ""), flush=True)


def limit_memory():
    """
    On Linux, ask for no more memory than the machine, the container or the job of a cluster has. A run that is too
    large ends in one line, and is not killed without a word.
    """
    if sys.platform != "linux":
        return
    import resource
    sizes = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    groups = [""]  # what a container sees as its own
    with contextlib.suppress(OSError):
        groups += [line.split(":", 2)[2] for line in Path("/proc/self/cgroup").read_text().splitlines()]
    for group in groups:
        for name in (f"{group}/memory.max", f"/memory{group}/memory.limit_in_bytes"):
            with contextlib.suppress(OSError, ValueError):  # no such file, or "max" in it
                sizes.append(int(Path("/sys/fs/cgroup" + name).read_text()))
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    sizes += [limit for limit in (soft, hard) if limit != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_DATA, (min(sizes), hard))


def main(argv=None):
    """The exit status: 2 with one line for a mistake of the user, 1 for a canary, 130 for a run that was stopped."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a sign that the terminal cannot show becomes "?"
    go_on = ""
    try:
        command, config = parse_command(argv, __doc__)
        if command.compare:
            compare([finished(folder, command) for folder in command.compare])
        elif command.prompt is not None:
            show_prompt(finished(command.out, command), command.prompt)
        elif command.export:
            export(finished(command.out, command), command.export)
        elif command.chat:
            chat(finished(command.chat, command, CHAT))
        else:
            run = Run(command.out, config, command.device)
            go_on = f"; the same command{', without --overwrite,' if command.overwrite else ''} continues from here"
            if is_finished(run) and not command.overwrite:  # nothing is written, so the folder may be read-only
                check_settings(run)
                table = format_table(run.read("report.json"))
                print(f"{run.folder} is finished.\n\n{table}\n\nopen {run.folder}/report.html")
            else:
                if run.device.type == "cpu":  # a GPU's driver asks for much that it never uses
                    limit_memory()
                with begin(run, command):
                    run_stages(run)
        return 0
    except (UserError, OSError) as fault:
        print(f"minirlhf: {printable(str(fault))}", file=sys.stderr)  # it may quote the user's files
        return 2
    except CanaryError as fault:
        print(f"\nminirlhf: stopped: {fault}. All that was finished before is kept", file=sys.stderr)
        return 1
    except (RuntimeError, MemoryError) as fault:
        if isinstance(fault, RuntimeError) and not re.search("out of memory|allocate memory", str(fault)):
            raise
        print("\nminirlhf: out of memory: lower --ppo-batch, --block-size or --n-embd, or give --micro-batch or --lora",
              file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\nminirlhf: stopped{go_on}", file=sys.stderr)
        return 130


if __name__ == "__main__":
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # with `| head` the program ends quietly
    for name in ("SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2"):  # kill, a closed terminal, the warnings of a cluster
        number = getattr(signal, name, None)
        if number and signal.getsignal(number) == signal.SIG_DFL:  # under nohup SIGHUP stays ignored
            signal.signal(number, signal.default_int_handler)  # as Ctrl-C
    sys.exit(main())
