"""Progress: the lines of a log file, files that are written whole, signals, and loops that go on after a stop."""

import copy
import errno
import gc
import os
import signal

import pytest
import torch
from helpers import PAD, PAIRS, tiny_gpt, unchanged, weights

import dpo
import grpo
import ppo
import reward
from checks import CanaryError
from data import UserError
from pipeline import progress, stages
from pipeline.config import Config
from pipeline.progress import ProgressBar, Stopped, stoppable, write_file
from reward import RewardModel

CONFIG = Config(batch_size=2, ppo_iterations=5, ppo_batch=4, minibatch=2, group=2, response_tokens=6, reward_epochs=2,
                dpo_epochs=2)
PROMPTS = [[1, 2, 3], [4], [5, 6]]


# ---- what is shown -------------------------------------------------------------------------------------------------

def test_a_log_file_gets_few_lines(capsys, monkeypatch):
    """A log file is filled with redraws of a bar, or nothing says how far a loop is."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    bar = ProgressBar(100, "ppo", "it")
    for step in bar:
        now[0] += 1.0
        bar.set_postfix(dict(score="0.5"), step=step)
    lines = capsys.readouterr().err.splitlines()
    done = [int(line.split("/")[0].removeprefix("ppo: ")) for line in lines]
    assert done == [1, *range(11, 100, 10), 100]
    assert lines[1] == "ppo: 11/100 it, 1 s/it, score 0.5, step 10"


def test_a_short_loop_within_a_stage_is_silent(capsys):
    """Every sampling of the report leaves its own lines in a log file."""
    assert list(ProgressBar(3, "samples", "batch", leave=False)) == [0, 1, 2]
    assert capsys.readouterr().err == ""


# ---- files ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("content", ["new", dict(x=torch.ones(3))])
def test_a_full_disk_is_one_line_and_leaves_the_old_file(content, tmp_path, monkeypatch):
    """A full disk ends in a traceback, leaves half a file, or a part of one beside the good one."""
    def full(number):
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "sft.pt").write_text("old")
    monkeypatch.setattr(progress.os, "fsync", full)
    with pytest.raises(UserError, match="sft.pt cannot be written .No space left on device"):
        write_file(tmp_path / "sft.pt", content)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


def test_a_folder_that_is_gone_is_one_line(tmp_path):
    """A folder that vanishes during the run ends in a traceback."""
    with pytest.raises(UserError, match="cannot be written .No such file or directory"):
        write_file(tmp_path / "gone" / "sft.pt", "new")


# ---- signals -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_loop_after_its_step(number, tmp_path):
    """A signal tears a step apart, is ignored, or the loop ends without a checkpoint."""
    network = torch.nn.Linear(2, 2)
    before = signal.getsignal(signal.SIGINT)  # ignored, where the tests run in the background
    steps = []
    with pytest.raises(Stopped) as stop, stoppable():
        for step in ProgressBar(9, "loop", "step", dict(network=network), tmp_path / "checkpoint.pt", "here"):
            if step == 3:
                os.kill(os.getpid(), number)
            steps.append(step)
    assert steps == [0, 1, 2, 3] and stop.value.number == number
    assert list(ProgressBar(9, "loop", "step", dict(network=network), tmp_path / "checkpoint.pt", "here")) == [
        4, 5, 6, 7, 8]
    assert signal.getsignal(signal.SIGINT) is before


def test_a_second_signal_stops_at_once(tmp_path):
    """A long step cannot be interrupted."""
    steps = []
    with pytest.raises(Stopped), stoppable():
        for step in ProgressBar(9, "loop", "step", {}, tmp_path / "checkpoint.pt"):
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            steps.append(step)
    assert steps == [] and not (tmp_path / "checkpoint.pt").exists()


def test_outside_of_a_loop_a_signal_stops_at_once():
    """What is not a training loop cannot be interrupted."""
    with pytest.raises(Stopped), stoppable():
        for _ in ProgressBar(9, "samples", "batch"):
            os.kill(os.getpid(), signal.SIGTERM)
            raise AssertionError("it goes on")


# ---- checkpoints ---------------------------------------------------------------------------------------------------

def train_sft(networks, log, make_bar):
    examples = [(pair["prompt"], pair["chosen"]) for pair in PAIRS]
    stages.train_sft(networks[0], examples, 6, 0.01, CONFIG, PAD, 1, "sft", log, make_bar)


def train_reward(networks, log, make_bar):
    reward.train_reward_model(networks[0], PAIRS, PAD, CONFIG, 1, log, make_bar)


def train_dpo(networks, log, make_bar):
    dpo.train_dpo(networks[0], tiny_gpt(0), PAIRS, PAD, CONFIG, 1, log, make_bar)


def train_ppo(networks, log, make_bar):
    ppo.train_ppo(*networks, tiny_gpt(0), copy.deepcopy(networks[1]), PROMPTS, CONFIG, 1, log, progress=make_bar)


def train_grpo(networks, log, make_bar):
    grpo.train_grpo(networks[0], tiny_gpt(0), make_reward_model(), PROMPTS, CONFIG, 1, log, progress=make_bar)


def make_reward_model():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return RewardModel(tiny_gpt(0)).double()


LOOPS = dict(sft=(train_sft, lambda: [tiny_gpt(0)]), reward=(train_reward, lambda: [make_reward_model()]),
             dpo=(train_dpo, lambda: [tiny_gpt(0)]), ppo=(train_ppo, lambda: [tiny_gpt(0), make_reward_model()]),
             grpo=(train_grpo, lambda: [tiny_gpt(0)]))


@pytest.mark.parametrize("name", LOOPS)
def test_a_loop_that_was_stopped_ends_with_the_same_bits(name, tmp_path, monkeypatch):
    """A loop goes on with other random numbers, a fresh optimizer, another order of data or a step twice."""
    train, make = LOOPS[name]
    expected, expected_rows = make(), []
    train(expected, lambda **row: expected_rows.append(row), ProgressBar)

    def make_bar(steps, title, unit, parts):
        return ProgressBar(steps, title, unit, parts, tmp_path / "checkpoint.pt", name)

    rows = []

    def log(**row):
        rows.append(row)
        progress.signals.asked = signal.SIGINT  # after every step

    for _ in range(len(expected_rows) - 1):
        networks = make()
        torch.manual_seed(len(rows))  # a process of its own
        with pytest.raises(Stopped):
            train(networks, log, make_bar)
        progress.signals.asked = None
    networks = make()
    train(networks, lambda **row: rows.append(row), make_bar)
    assert [row["step"] for row in rows] == list(range(len(expected_rows)))
    for row, other in zip(rows, expected_rows):
        assert {**row, "seconds": 0} == {**other, "seconds": 0}
    for network, other in zip(networks, expected):
        assert unchanged(network, weights(other))


@pytest.mark.parametrize("name", LOOPS)
def test_a_gradient_that_is_not_finite_stops_the_loop(name):
    """The loss is finite and its gradient is not: the weights are NaN, and the loop goes on to its end."""
    train, make = LOOPS[name]
    networks, rows = make(), []

    def overflow(gradient):
        return gradient * float("inf") if rows else gradient  # from the second step

    for network in networks:
        next(network.parameters()).register_hook(overflow)
    with pytest.raises(CanaryError, match="training diverged"):
        train(networks, lambda **row: rows.append(row), ProgressBar)
    assert len(rows) <= 2


def test_a_checkpoint_holds_the_generator_of_everything(tmp_path):
    """Random numbers that come from the global generator are drawn twice."""
    def draw(stop):
        torch.manual_seed(0)
        numbers = []
        for step in ProgressBar(6, "loop", "step", {}, tmp_path / "checkpoint.pt"):
            numbers.append(torch.rand(()).item())
            if step == stop:
                progress.signals.asked = signal.SIGINT
        return numbers

    expected = draw(None)
    with pytest.raises(Stopped):
        draw(2)
    progress.signals.asked = None
    assert draw(None) == expected[3:]


def test_a_checkpoint_is_written_now_and_then(tmp_path, monkeypatch):
    """A kill -9 loses the whole stage, or most of the time goes into checkpoints."""
    now, written = [0.0], []
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])

    def write(path, content):
        written.append(content["step"])
        now[0] += 1.0

    monkeypatch.setattr(progress, "write_file", write)
    for _ in ProgressBar(200, "loop", "step", {}, tmp_path / "checkpoint.pt"):
        now[0] += 1.0
    assert written == [20, 70, 120, 170]  # the first after SAVES, then fifty times what writing cost


def test_a_checkpoint_of_another_stage_is_not_used(tmp_path):
    """PPO starts with the state of DPO, or the second of two equal stages with that of the first."""
    network = torch.nn.Linear(1, 1)
    bar = ProgressBar(9, "loop", "step", dict(network=network), tmp_path / "checkpoint.pt", "4 ppo")
    bar.step = 3
    bar.save()
    for place, start in (("4 ppo", 4), ("5 ppo", 0), ("4 dpo", 0)):
        assert ProgressBar(9, "loop", "step", dict(network=network), tmp_path / "checkpoint.pt", place).start == start


def test_a_damaged_checkpoint_is_one_line(tmp_path):
    """A checkpoint that is no checkpoint ends in a traceback, or the loop begins anew and nobody knows."""
    (tmp_path / "checkpoint.pt").write_bytes(b"<!doctype html>")
    with pytest.raises(UserError, match="checkpoint.pt is damaged: remove it"):
        ProgressBar(9, "loop", "step", {}, tmp_path / "checkpoint.pt", "4 ppo")


def test_the_last_good_checkpoint_stays(tmp_path):
    """Weights that are not finite replace the last good ones."""
    network = torch.nn.Linear(1, 1)
    bar = ProgressBar(9, "loop", "step", dict(network=network), tmp_path / "checkpoint.pt")
    bar.save()
    before = (tmp_path / "checkpoint.pt").read_bytes()
    network.weight.data.fill_(float("nan"))
    bar.step = 5
    bar.save()
    assert (tmp_path / "checkpoint.pt").read_bytes() == before and bar.saved == 1


# ---- memory --------------------------------------------------------------------------------------------------------

@pytest.mark.slow
def test_memory_does_not_grow_over_many_iterations():
    """Every iteration keeps something alive, such as a rollout or a graph: a long run ends without memory."""
    policy, critic = LOOPS["ppo"][1]()
    alive = []

    def log(step, **row):
        if step in (50, 499):
            gc.collect()
            tensors = [x for x in gc.get_objects() if issubclass(type(x), torch.Tensor)]
            alive.append((len(tensors), sum(x.numel() for x in tensors)))

    config = Config(**{**vars(CONFIG), "ppo_iterations": 500, "ppo_epochs": 1, "minibatch": 4, "response_tokens": 3})
    ppo.train_ppo(policy, critic, tiny_gpt(0), copy.deepcopy(critic), PROMPTS, config, 1, log)
    assert alive[1][0] <= alive[0][0] + 2 and alive[1][1] <= alive[0][1] + 500  # rollouts differ in length
