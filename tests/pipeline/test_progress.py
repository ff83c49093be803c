"""Progress: the lines of a log file, files that are written whole, signals, and when a checkpoint is written."""

import errno
import gc
import os
import signal
import sys

import pytest
import torch
from helpers import tiny_gpt

from pipeline import progress
from pipeline.errors import UserError
from pipeline.progress import bar, follow, stopper, write_file
from ppo import PPOConfig, train_ppo
from reward import RewardModel


def loop(steps, start=0, parts=None, then=lambda step: None):
    """A loop as the lessons have it: it yields metrics and parts. `then` is called within each step."""
    for step in range(start, steps):
        then(step)
        yield dict(step=step, loss=step / 2, extra=1.0), parts


# ---- what is shown -------------------------------------------------------------------------------------------------

def test_what_a_loop_yields_comes_through():
    """Bug: metrics, or the rollout of a loop that samples, are lost on their way; or parts are logged."""
    assert list(follow(loop(3), 3, "sft")) == [(dict(step=i, loss=i / 2, extra=1.0),) for i in range(3)]
    rollouts = ((dict(step=i), {}, f"rollout {i}") for i in range(2))
    assert list(follow(rollouts, 2, "ppo")) == [(dict(step=0), "rollout 0"), (dict(step=1), "rollout 1")]


def test_a_log_file_gets_few_lines(capsys):
    """Bug: a log file is filled with redraws of a bar, or does not say how far a loop is and what it logs."""
    for _ in follow(loop(300, 200), 300, "ppo", start=200):
        pass
    lines = capsys.readouterr().err.split("\r")
    assert len(lines) <= 4 and "ppo: 100%" in lines[-1] and "300/300" in lines[-1] and "loss 149.50]" in lines[-1]
    assert any("200/300" in line for line in lines)
    with bar(10, "normalise", "answer", leave=False) as progress_bar:
        progress_bar.update(10)
    assert capsys.readouterr().err.replace("\r", " ").split("\n") != [""]


def test_without_a_terminal(monkeypatch):
    """Bug: a run whose streams are closed ends in a traceback."""
    monkeypatch.setattr(sys, "stderr", None)
    assert len(list(follow(loop(3), 3, "sft"))) == 3


# ---- files ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("content", ["new é", dict(x=torch.ones(3))])
def test_a_full_disk_is_one_line_and_leaves_the_old_file(content, tmp_path, monkeypatch):
    """Bug: a full disk ends in a traceback, leaves half a file, or a part of one beside the good one."""
    def full(number):
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "sft.pt"
    path.write_text("old")
    with monkeypatch.context() as patch:
        patch.setattr(progress.os, "fsync", full)
        with pytest.raises(UserError, match="sft.pt cannot be written .No space left on device.: the old content is"):
            write_file(path, content)
        assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]
    write_file(path, content)
    if isinstance(content, str):
        assert path.read_text(encoding="utf-8") == content
    else:
        assert torch.equal(torch.load(path, weights_only=True)["x"], content["x"])
    assert list(tmp_path.iterdir()) == [path]


def test_the_new_file_takes_its_place_in_one_step(tmp_path, monkeypatch):
    """Bug: the old file is removed before the new one is whole, or the new one is not on the disk yet."""
    path, seen = tmp_path / "sft.pt", []
    path.write_text("old")
    monkeypatch.setattr(progress.os, "fsync", lambda number: seen.append("on the disk"))
    monkeypatch.setattr(progress.os, "replace", lambda part, target: seen.append(
        (open(part).read(), open(target).read(), target.name)))
    write_file(path, "new")
    assert seen == ["on the disk", ("new", "old", "sft.pt")]
    with pytest.raises(UserError, match="cannot be written .No such file or directory"):
        write_file(tmp_path / "gone" / "sft.pt", "new")


# ---- signals -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2"])
def test_a_signal_ends_the_loop_after_its_step(name):
    """Bug: a signal tears a step apart, is ignored, kills the process, or the loop ends without a checkpoint."""
    number = getattr(signal, name)
    before, steps, saved = signal.getsignal(number), [], []
    kill = lambda step: step == 3 and os.kill(os.getpid(), number)  # noqa: E731
    with pytest.raises(KeyboardInterrupt), stopper:
        for metrics, in follow(loop(9, parts="parts", then=kill), 9, "sft", save=lambda *saves: saved.append(saves)):
            steps.append(metrics["step"])
    assert steps == [0, 1, 2, 3] and saved == [("parts", 4)]
    assert signal.getsignal(number) is before and not stopper.asked and not stopper.in_loop


def test_a_signal_in_the_last_step_saves_nothing():
    """Bug: a finished loop leaves a checkpoint behind its end, or the results of the stage are not written."""
    saved = []
    kill = lambda step: step == 2 and os.kill(os.getpid(), signal.SIGTERM)  # noqa: E731
    try:
        with stopper:
            steps = list(follow(loop(3, then=kill), 3, "sft", save=lambda *saves: saved.append(saves)))
    except KeyboardInterrupt:  # it would end the tests
        raise AssertionError("stopped after the last step") from None
    assert len(steps) == 3 and not saved


def test_a_second_signal_stops_at_once():
    """Bug: a long step cannot be interrupted, or a stop between two loops waits for the next one."""
    def twice(step):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    steps, saved = [], []
    with pytest.raises(KeyboardInterrupt), stopper:
        for metrics in follow(loop(9, then=twice), 9, "sft", save=lambda *saves: saved.append(saves)):
            steps.append(metrics)
    assert steps == saved == []
    with pytest.raises(KeyboardInterrupt), stopper:
        assert len(list(follow(loop(2), 2, "sft"))) == 2
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("it was not stopped")


def test_a_checkpoint_is_written_now_and_then(monkeypatch):
    """Bug: a kill -9 loses the whole stage, or most of the time goes into checkpoints."""
    now, written = [0.0], []
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])

    def save(parts, step):
        written.append(step)
        now[0] += 1.0

    for _ in follow(loop(200), 200, "sft", save=save):
        now[0] += 1.0
    assert written == [20, 70, 120, 170]  # the first after SAVES, then fifty times what writing cost


# ---- memory --------------------------------------------------------------------------------------------------------

def tensors_alive():
    gc.collect()
    tensors = [x for x in gc.get_objects() if issubclass(type(x), torch.Tensor)]
    return len(tensors), sum(x.numel() for x in tensors)


@pytest.mark.slow
def test_memory_does_not_grow_over_many_iterations():
    """Bug: every iteration keeps something alive, such as a rollout or a graph: a long run ends without memory."""
    config = PPOConfig(response_tokens=3, ppo_iterations=500, ppo_batch=4, minibatch=4, ppo_epochs=1)
    scorer, critic, alive = RewardModel(tiny_gpt(0)).double(), RewardModel(tiny_gpt(0)).double(), []
    for metrics, *_ in follow(train_ppo(tiny_gpt(0), critic, tiny_gpt(0), scorer, [[1, 2, 3], [4], [5, 6]], config, 1),
                              500, "ppo"):
        if metrics["step"] in (50, 499):
            alive.append(tensors_alive())
    assert alive[1][0] <= alive[0][0] + 2 and alive[1][1] <= alive[0][1] + 500  # rollouts differ in length
