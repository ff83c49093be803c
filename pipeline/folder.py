"""What may be done with a run's folder. All that can be refused is refused before anything is written or removed."""

import json
from pathlib import Path

from filelock import FileLock, Timeout

from pipeline.config import POLICIES, Config, check_owner, flag, read_settings
from pipeline.errors import UserError, need
from pipeline.own import load_function
from pipeline.run import SHAPES, Run
from pipeline.stages import all_stages, check_pairs, check_prompts, make_data, settings_of


def begin(run, command):
    """Prepare the folder and lock it: a context for the run's work."""
    taken = {}
    if command.overwrite:
        check_owner(run.folder)
    if command.source:
        other = Run(command.source, Config(**read_settings(command.source)))
        taken = taken_over(run, other)
    if not command.overwrite:
        check_settings(run)
    begins = command.overwrite or not run.has(["config.json"])
    if begins:  # a mistake in the user's files is found before anything is done
        if ".py:" in run.config.reward_from:
            load_function(run.config.reward_from, alone=not run.config.prompts)
        tokenizer = run.tokenizer if run.config.init else None
        if "pretrain" in taken and run.config.data:
            check_pairs(run.config, tokenizer or other.tokenizer, other.texts)
        elif "pretrain" in taken and run.config.prompts:
            check_prompts(run.config, tokenizer, other.texts["train"] + other.texts["heldout"])
        elif not run.config.in_world:
            run.data = make_data(run.config, tokenizer)
    locked = lock(run.folder)
    if command.overwrite:
        remove_all(run)
    if begins:
        write_settings(run)
        for name, stage in taken.items():
            take_over(run, other, name, stage.files)
    else:
        run.write_rows("metrics.jsonl", run.rows())  # without half a line of a process that was killed
    return locked


def lock(folder):
    """A context in which no other process works in this folder. Makes the folder."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return FileLock(folder / ".lock").acquire(timeout=0)
    except Timeout:
        raise UserError(f"{folder} is in use by another process: wait for it, or name another folder with "
                        "--out") from None
    except OSError as fault:
        raise UserError(f"{folder} cannot be the folder of a run ({fault.strerror}): name another one with "
                        "--out") from None


def check_settings(run):
    """Raise UserError if the folder holds a run with other settings, or files of a run without its settings."""
    folder, config = run.folder, run.config
    if not run.has(["config.json"]):
        others = [name for name in (*SHAPES, "sft.pt", "pretrained.pt") if run.has([name])]
        if others:
            raise UserError(f"{folder} holds {others[0]} and no config.json, so its settings are not known: name "
                            "another folder with --out, or start over with --overwrite")
        return
    settings = read_settings(folder)
    for name, value in vars(config).items():
        old = settings[name]
        if name.endswith("_sha256"):  # "": the file is gone, and the run needs it no more
            file = config.reward_from if name == "reward_sha256" else config.data or config.prompts
            need(value in ("", old), f"{file} has changed since {folder} was begun with it: begin another run with "
                 "--out")
            continue
        need(old == value, f"{folder} was made with {flag(name)} {old!r}, not {value!r}: repeat its options, or begin "
             f"a new run from it with --from {folder}")


def write_settings(run):
    run.write("config.json", json.dumps(vars(run.config), indent=1))


def remove_all(run):
    """Remove the files of a run. Other files in the folder stay."""
    networks = ["pretrained", "sft", "reward", "robust", "checkpoint", *POLICIES,
                *[f"{name}_critic" for name in POLICIES]]
    names = ["config.json", *SHAPES, "report.html", "samples.txt", *[f"{name}.pt" for name in networks]]
    read = [Path(path).resolve() for path in (run.config.data, run.config.prompts) if path]
    for path in [run.folder / name for name in names]:
        need(path.resolve() not in read, f"--overwrite would remove {path}, which the run reads: name another folder "
             "with --out")
    run.remove(names)


def taken_over(run, other):
    """The finished stages of another run with the same settings as this run, earlier stages included: a dict."""
    taken = {}
    for name, stage in all_stages(run.config).items():
        there = name in all_stages(other.config) and other.has(stage.files)
        equal = there and settings_of(name, run.config) == settings_of(name, other.config)
        if equal and name != "report":  # it tells all settings, and the name of its folder
            taken[name] = stage
    return taken


def take_over(run, other, stage, files):
    """Copy the files of a finished stage of another run into this run's folder, and its rows."""
    for name in files:
        run.write(name, (other.folder / name).read_bytes())
    for name in ("metrics.jsonl", "watch.jsonl"):
        rows = [row for row in other.rows(name) if row["stage"] == stage]
        run.write_rows(name, run.rows(name) + rows)


def finished(folder, command, free=()):
    """The run that a command asks something. Only the free options may differ from its own: others have no effect."""
    settings = read_settings(folder)
    for name, value in command.given.items():
        need(name in free or settings[name] == value, f"{folder} was made with {flag(name)} {settings[name]!r}, not "
             f"{value!r}: leave it out, or begin a new run with it")
    return Run(folder, Config(**{**settings, **command.given}), command.device)


def is_finished(run):
    return run.has(["config.json"]) and all(run.has(stage.files) for stage in all_stages(run.config).values())
