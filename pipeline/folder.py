"""
The folder of a run: its files, and the command that works on them.

    config.json, stages.json, metrics.jsonl    the settings; what each finished stage used and saw; a line per step
    plan.json, checkpoint.pt, .lock            while a command runs: what --resume goes on with

A file is written whole or not at all. A stage that is refused or stopped changes no setting in config.json, and no file
of a finished stage. The files that stages make are listed in MADE_BY, their contents in run.py.
"""

import hashlib
import json
import math
from pathlib import Path

from filelock import FileLock, Timeout  # torch needs it too

from checks import canary
from data import UserError
from pipeline.config import COMMAND, OWNED, first_settings, read_json, read_saved
from pipeline.progress import ProgressBar, write_file

MADE_BY = {"tokenizer.json": "pretrain", "split.jsonl": "pretrain", "tokens.pt": "pretrain", "data.json": "pretrain",
           "pretrained.pt": "pretrain", "sft.pt": "sft", "gold.json": "preferences",
           "preferences.jsonl": "preferences", "reward.json": "reward", "reward.pt": "reward",
           "ppo.pt": "ppo", "critic.pt": "ppo", "grpo.pt": "grpo",
           "dpo.pt": "dpo", "report.json": "report"}  # file -> stage
RESULTS = ("report.md", "report.html", "samples.txt", "watch.jsonl", "config.json", "stages.json", "metrics.jsonl",
           "plan.json", "checkpoint.pt")


def is_texts(content):
    return isinstance(content, list) and all(isinstance(text, str) and text for text in content)


def has_numbers(*names):
    """A function that says whether content is a dict with finite numbers under these names."""
    def check(content):
        numbers = [content.get(name) for name in names] if isinstance(content, dict) else [None]
        return all(type(number) in (int, float) and math.isfinite(number) for number in numbers)
    return check


def is_split(**types):
    """A function that says whether content is rows of both splits, with values of these types under these names."""
    def check(rows):
        good = {row.get("split") for row in rows if isinstance(row, dict)} == {"train", "heldout"}
        return good and all(isinstance(row, dict) and all(isinstance(row.get(name), kind) and row[name]
                                                          for name, kind in types.items()) for row in rows)
    return check


SHAPES = {"tokenizer.json": is_texts, "gold.json": has_numbers("mean", "std"),
          "reward.json": has_numbers("accuracy", "pairs"), "data.json": lambda content: isinstance(content, dict),
          "report.json": lambda content: isinstance(content, dict) and {"policies", "config"} <= set(content),
          "split.jsonl": is_split(prompt=str), "preferences.jsonl": is_split(prompt=list, chosen=list, rejected=list)}


def file_hash(path):
    """The SHA-256 of a file. Raises UserError when it cannot be read."""
    total = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            for block in iter(lambda: file.read(1 << 20), b""):
                total.update(block)
    except OSError as fault:
        raise UserError(f"{path}: cannot be read ({fault.strerror})") from None
    return total.hexdigest()


def fingerprint(items):
    """The size and the hash of a set of texts, prompts or pairs: the SHA-256 of those of its items, sorted."""
    hashes = sorted({hashlib.sha256(json.dumps(item).encode()).digest() for item in items})
    return dict(count=len(hashes), sha256=hashlib.sha256(b"".join(hashes)).hexdigest())


class Folder:
    """The folder of a run, for a command with these settings."""

    def __init__(self, config):
        self.config = config
        self.folder = Path(config.out)
        self.stage, self.done = None, 0  # the stage that runs, and its place in the command
        self.planned = self.resumed = False  # whether the command can be resumed; whether this stage was interrupted
        self.bar = None  # of the last training loop
        self.sets = {}  # what this stage saw: name -> fingerprint
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as fault:
            raise UserError(f"{self.folder} cannot be the folder of a run ({fault.strerror}): "
                            "name another one with --out") from None

    # ---- a command: its plan, and its finished stages

    def lock(self):
        """A context in which no other process runs stages in this folder."""
        try:
            return FileLock(self.folder / ".lock").acquire(timeout=0)
        except Timeout:
            raise UserError(f"{self.folder} is in use by another process: wait for it, or name another folder with "
                            "--out") from None
        except OSError as fault:
            raise UserError(f"{self.folder} cannot be written to ({fault.strerror}): name another one with "
                            "--out") from None

    def begin(self, stages):
        """Prepare the folder for a command. Returns how many of its stages are done already: 0 but for --resume."""
        config = self.config
        anew = stages[0] == "pretrain" and not config.resume
        if anew and not config.overwrite:
            self.check_free()
        for name in (*RESULTS, *MADE_BY):
            self.remove(f"{name}.part")  # from a process that was killed while it wrote
        if anew:
            self.clear()
        else:
            self.check_data()
        self.planned = True
        if config.resume:
            damaged = f"{self.folder}/plan.json is damaged: begin the stages anew with --stages"
            self.done = read_json(self.folder / "plan.json", f"{self.folder}: nothing to resume", damaged).get("done")
            if self.done not in range(len(stages) + 1):
                raise UserError(damaged)
            self.resumed = True
        elif stages == ["report"] and (self.folder / "plan.json").exists():
            self.planned = False  # a look at a run that was interrupted, which can still be resumed
        else:
            self.remove("checkpoint.pt")
            self.write_plan()
        return self.done

    def check_free(self):
        """Raise UserError when the folder holds a finished run, or one of another data file."""
        advice = "name another folder with --out, or begin it anew with --overwrite"
        if (self.folder / "report.json").exists():
            raise UserError(f"{self.folder} holds a finished run: {advice}")
        if self.config.data and (self.folder / "data.json").exists():
            other = self.read("data.json").get("path")
            if other != str(Path(self.config.data).resolve()):
                raise UserError(f"{self.folder} holds a run of {other}: {advice}")

    def write_plan(self):
        settings = {name: value for name, value in vars(self.config).items() if name != "out"}
        self.write("plan.json", json.dumps(dict(done=self.done, settings=settings), indent=1))

    def clear(self):
        """Remove the files of an old run, so that none of its networks stays beside a new tokenizer."""
        for name in (*RESULTS, *MADE_BY):
            self.remove(name)

    def remove(self, name):
        try:
            (self.folder / name).unlink(missing_ok=True)
        except OSError as fault:
            raise UserError(f"{self.folder / name} cannot be removed ({fault.strerror})") from None

    def check_data(self):
        """Raise UserError when the data file is not the one that pretraining split. It may be gone."""
        if self.config.data and Path(self.config.data).is_file() and (self.folder / "data.json").exists():
            if file_hash(self.config.data) != self.read("data.json").get("sha256"):
                raise UserError(f"{self.config.data} has changed since this run was begun with it: begin another run "
                                "with --out")

    def finish(self, stage, seconds):
        """A stage has finished: its options become those of the run, and what it used and saw is written down."""
        record = self.finished()
        record.pop(stage, None)  # the order is that in which the stages ended
        used = {name: getattr(self.config, name) for name in OWNED[stage]}
        record[stage] = dict(seconds=round(seconds, 1), seed=self.config.seed, settings=used, sets=self.sets)
        self.write("config.json", json.dumps(self.settings(stage), indent=1))
        self.write("stages.json", json.dumps(record, indent=1))
        self.done += 1
        self.resumed, self.sets = False, {}
        if self.planned:
            self.write_plan()

    def end(self):
        """The command is done: there is nothing to resume."""
        if self.planned:
            self.remove("plan.json")
            self.remove("checkpoint.pt")

    def finished(self):
        """stages.json: a dict for each finished stage, in the order in which they ended."""
        path = self.folder / "stages.json"
        damaged = f"{path} is damaged: remove it, and go on"
        records = read_json(path, "", damaged) if path.exists() else {}
        if not all(isinstance(record, dict) and {"seconds", "seed"} <= set(record) for record in records.values()):
            raise UserError(damaged)
        return records

    def settings(self, stage):
        """The settings of the run once `stage` has finished: every option as the stage that it belongs to used it."""
        known = (self.folder / "config.json").exists()
        settings = read_saved(self.folder) if known else first_settings(vars(self.config))
        settings.update({name: getattr(self.config, name) for name in OWNED[stage]})
        if stage == "pretrain":
            settings["seed"] = self.config.seed
        return settings

    def used(self, name):
        """The "seconds" or the "seed" of each finished stage but this one, in the order in which the stages ended."""
        return {stage: record[name] for stage, record in self.finished().items() if stage != self.stage}

    def saved_config(self):
        """The settings as they are used, without those of the command. The seed is that of pretraining."""
        settings = {name: value for name, value in vars(self.config).items() if name not in COMMAND}
        return {**settings, "seed": self.settings("report")["seed"]}

    def where(self):
        """The step and the last good checkpoint of the loop that ran last, as a sentence."""
        if self.bar is None:
            return ""
        saved = f"; the last good checkpoint is after step {self.bar.saved}" if self.bar.saved else ""
        return f" It was in step {self.bar.step} of the stage {self.stage}{saved}."

    def saw(self, **sets):
        """Write down which texts, prompts or pairs this stage sees, by name."""
        self.sets.update({name: fingerprint(items) for name, items in sets.items()})

    def progress(self, steps, name, unit, parts):
        """The ProgressBar of this stage's training loop, with checkpoints."""
        path = self.folder / "checkpoint.pt"
        self.bar = ProgressBar(steps, name, unit, parts, path, place=f"{self.done} {self.stage}")
        if self.resumed:
            self.drop_metrics(self.stage, self.bar.start)
        return self.bar

    # ---- files

    def write(self, name, content):
        """Write a file of the run. An interrupted write leaves the old one whole."""
        write_file(self.folder / name, content)

    def path(self, name):
        """The path of a file that a stage has made. Raises UserError when it is missing."""
        if not (self.folder / name).exists():
            raise UserError(f"{self.folder / name} is missing: run --stages {MADE_BY[name]} first")
        return self.folder / name

    def damaged(self, name):
        return UserError(f"{self.folder / name} is damaged: run --stages {MADE_BY[name]} again")

    def read(self, name):
        """The content of a .json file, or the list of rows of a .jsonl file. UserError for one of another shape."""
        path = self.path(name)
        try:
            with open(path, encoding="utf-8") as file:
                content = [json.loads(line) for line in file] if path.suffix == ".jsonl" else json.load(file)
            if SHAPES[name](content):
                return content
        except (OSError, ValueError, RecursionError):
            pass
        raise self.damaged(name)

    # ---- metrics

    def drop_metrics(self, stage, start=0):
        """Remove the rows of a stage from step `start` on."""
        rows = [row for row in self.metrics() if row["stage"] != stage or row.get("step", math.inf) < start]
        self.write("metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))

    def begin_metrics(self, stage):
        """Drop this stage's old rows, unless it goes on, and return the function that logs new ones."""
        self.drop_metrics(stage, math.inf if self.resumed else 0)  # in any case the row of one that ended

        def log(**row):
            for name, value in row.items():
                finite = not isinstance(value, float) or math.isfinite(value)
                canary(finite, f"{stage}: {name} is {value}: the training diverged; lower its learning rate")
            try:
                with open(self.folder / "metrics.jsonl", "a", encoding="utf-8") as file:
                    file.write(json.dumps(dict(stage=stage, **row), allow_nan=False) + "\n")
            except OSError as fault:
                raise UserError(f"{self.folder / 'metrics.jsonl'} cannot be written ({fault.strerror})") from None
        return log

    def metrics(self, name="metrics.jsonl"):
        """All rows of metrics.jsonl, or of another file whose rows have a stage, as dicts; none if it is not there."""
        path = self.folder / name
        rows = []
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []:
            try:
                row = json.loads(line)
            except ValueError:  # half a line, from a run that was killed while it wrote
                continue
            if isinstance(row, dict) and "stage" in row:
                rows.append(row)
        return rows

    def last_metrics(self, stage, names):
        """The means of a stage's last ten logged rows, as one line."""
        rows = [row for row in self.metrics() if row["stage"] == stage and "step" in row][-10:]
        means = {name: sum(row[name] for row in rows) / len(rows) for name in names if name in rows[-1]}
        return ", ".join(f"{name.replace('_', ' ')} {mean:.2f}" for name, mean in means.items())
