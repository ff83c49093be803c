"""What the stages leave for each other in the folder of a run: rows, networks, prompts, pairs and gold."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from helpers import random_batch

import world
from checks import CanaryError
from data import collate
from model import GPT, GPTConfig, generate
from pipeline import run as run_module
from pipeline.config import Config, read_settings
from pipeline.errors import UserError
from pipeline.run import Run, fits
from reward import RewardModel
from tokenizer import end_id


@pytest.fixture
def empty(tmp_path):
    """A run of small sizes in an empty folder, with a tokenizer."""
    run = Run(tmp_path, Config(n_embd=8, n_head=2, n_layer=1, block_size=24, response_tokens=20), "cpu")
    run.write("tokenizer.json", json.dumps([" é", "β"]))
    return run


@pytest.fixture
def finished(tiny):
    """The shared tiny run, for reading."""
    return Run(tiny, Config(**read_settings(tiny)))


# ---- files ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("content, shape, good", [
    (1, 0, True), (1.0, 0, False), (True, 0, False), (1, 0.0, True), (1.5, 0.0, True), (math.nan, 0.0, False),
    (math.inf, 0.0, False), ("1", 0.0, False), (None, 0.0, False), (None, (0.0, None), True), ("", (0.0, None), False),
    ("x", "", True), ([], [""], True), (["x", 1], [""], False), ({"a": 1}, {"a": 0}, True), ({}, {"a": 0}, False),
    ({"a": 1, "b": "x"}, {"a": 0}, True), ({"a": "x", "b": 1}, {"a": "", "*": 0.0}, True),
    ({"a": "x", "b": "y"}, {"a": "", "*": 0.0}, False), ({"b": 1}, {"a": "", "*": 0.0}, False), ([], {"a": 0}, False)])
def test_fits_by_hand(content, shape, good):
    """Bug: a content of another kind passes: a fraction or true for an id, a text for a number, a key that lacks."""
    assert fits(content, shape) is good


def test_rows_are_added_and_what_is_not_finite_stops_the_run(empty):
    """Bug: a row is lost or doubled, or NaN is written into a file that no reader of JSON can read."""
    assert empty.rows() == empty.rows("watch.jsonl") == []
    for step in range(3):
        empty.log("sft", dict(step=step, loss=0.5))
    with pytest.raises(CanaryError, match="sft: loss is nan: the training diverged"):
        empty.log("sft", dict(step=3, loss=math.nan))
    assert empty.rows() == [dict(stage="sft", step=step, loss=0.5) for step in range(3)]


def test_a_result_is_the_mean_of_the_last_ten_steps(empty):
    """Bug: the line of a stage shows its first rows, all rows, its seconds, or those of another stage."""
    for stage in ("dpo", "ppo"):
        for step in range(14):
            empty.log(stage, dict(step=step, loss=float(step ** 2), chosen_logp=-float(step), other=1.0))
        empty.log(stage, dict(stage_seconds=9.0))
    mean = sum(step ** 2 for step in range(4, 14)) / 10
    line = empty.last_metrics("dpo", ["loss", "gold", "chosen_logp"])
    assert line == f"mean of the last 10 steps: loss {mean:.2f}, chosen logp -8.50"


# ---- training ------------------------------------------------------------------------------------------------------

def test_training_logs_what_it_observes(empty, monkeypatch):
    """Bug: what `observe` adds is not logged, it does not see the start or the rollout, or a checkpoint is NaN."""
    network, observed, saves = torch.nn.Linear(1, 1), [], []

    def follow(loop, steps, name, start, save):
        assert (steps, name, start) == (3, "ppo", 0)
        for metrics, parts, rollout in loop:
            yield metrics, rollout
            save(parts, metrics["step"] + 1)
            saves.append(empty.checkpoint("ppo")["step"])

    def loop(checkpoint):
        assert checkpoint is None
        for step in range(3):
            network.weight.data.fill_(math.nan if step == 2 else step)
            yield dict(step=step), dict(policy=network), f"rollout {step}"

    def observe(metrics, rollout):
        observed.append((metrics and metrics["step"], rollout))
        if metrics:
            metrics["gold"] = 2.0 * metrics["step"]

    monkeypatch.setattr(run_module, "follow", follow)
    empty.log("sft", dict(step=0))
    empty.train("ppo", loop, 3, observe)
    assert observed == [(None, None), (0, "rollout 0"), (1, "rollout 1"), (2, "rollout 2")]
    found = empty.rows()
    assert [(row["stage"], row["step"], row.get("gold")) for row in found] == [
        ("sft", 0, None), ("ppo", 0, 0.0), ("ppo", 1, 2.0), ("ppo", 2, 4.0)]
    assert all(row["seconds"] >= 0 for row in found[1:])
    assert saves == [1, 2, 2]  # the last good one stays
    assert empty.checkpoint("dpo") is None  # PPO does not start with the state of DPO


def test_rows_behind_a_checkpoint_are_dropped(empty):
    """Bug: after kill -9 the steps that were done since the checkpoint are in metrics.jsonl twice."""
    for stage in ("sft", "ppo"):
        for step in range(5):
            empty.log(stage, dict(step=step, old=1.0))
    watched = [dict(stage="ppo", step=step, texts=["x"], score=[1.0], gold=[None]) for step in (-1, 1, 2, 4)]
    empty.write_rows("watch.jsonl", watched)
    empty.write("checkpoint.pt", dict(stage="ppo", step=2, parts={}))
    empty.train("ppo", lambda checkpoint: ((dict(step=i), {}) for i in range(checkpoint["step"], 4)), 4)
    assert [(row["step"], "old" in row) for row in empty.rows() if row["stage"] == "ppo"] == [
        (0, True), (1, True), (2, False), (3, False)]
    assert len([row for row in empty.rows() if row["stage"] == "sft"]) == 5
    assert empty.rows("watch.jsonl") == watched[:2]


# ---- networks ------------------------------------------------------------------------------------------------------

def test_networks_survive_the_folder(empty):
    """Bug: a network changes on its way through the folder: the score's head, its mean and its std are lost."""
    policy = GPT(empty.sizes)
    model = RewardModel(policy)
    model.mean.fill_(0.3)
    model.std.fill_(2.0)
    ids = torch.tensor([[1, 2, 3]])
    empty.save_network("dpo", policy)
    loaded = empty.load_network("dpo")
    assert torch.equal(loaded(ids), policy(ids)) and isinstance(loaded, GPT)
    for name in ("reward", "ppo_critic"):
        empty.save_network(name, model)
        loaded = empty.load_network(name)
        assert loaded(random_batch()).tolist() == model(random_batch()).tolist()
        assert not loaded.training and not any(weight.requires_grad for weight in loaded.parameters())


def test_a_network_of_another_run_is_refused(empty):
    """Bug: a network with another number of heads fits its file and answers nonsense; or NaN is saved."""
    sizes = dict(vars(empty.sizes), n_head=4)
    other = GPT(GPTConfig(**sizes))
    empty.write("sft.pt", dict(config=sizes, network=other.state_dict()))
    with pytest.raises(UserError, match="sft.pt cannot be read"):
        empty.load_network("sft")
    other.wte.weight.data[0] = math.inf
    with pytest.raises(CanaryError, match="the weights of ppo are not finite"):
        empty.save_network("ppo", other)


# ---- prompts, pairs and gold ---------------------------------------------------------------------------------------

def test_long_prompts_lose_their_left_and_few_are_repeated(empty):
    """Bug: a prompt is cut on its right: the policy answers to the beginning of the text; or prompts are missing."""
    rows = [dict(split=side, prompt=f"abcdef{i}") for i, side in enumerate(["train", "heldout", "train", "heldout"])]
    empty.write_rows("split.jsonl", rows)
    empty.config.eval_prompts = 5
    assert empty.prompts == [[list(b"def0"), list(b"def2")], [list(b"def1"), list(b"def3")]]
    assert empty.eval_prompts == [list(f"def{i}".encode()) for i in (1, 3, 1, 3, 1)]


def test_pairs_are_those_of_their_split(empty):
    """Bug: held-out pairs are trained on, or a token that the vocabulary does not have ends in a traceback."""
    rows = [dict(split=side, prompt=[i], chosen=[1], rejected=[2], gold=[0.5, 1], ceiling=0.7)
            for i, side in enumerate(["heldout", "train", "train", "heldout", "train"])]
    empty.write_rows("preferences.jsonl", rows)
    assert empty.pairs == [[rows[1], rows[2], rows[4]], [rows[0], rows[3]]]
    for change in (dict(prompt=[]), dict(chosen=[empty.tokenizer.n_vocab]), dict(rejected=[-1]), dict(gold="x"),
                   dict(chosen=[1] * 24), dict(split="train")):
        del empty.pairs
        empty.write_rows("preferences.jsonl", [row | change if row["split"] == "heldout" else row for row in rows])
        with pytest.raises(UserError, match="preferences.jsonl cannot be read"):
            print(empty.pairs)
        empty.pairs = None


def test_gold_is_that_of_the_world_in_standard_deviations(finished, files):
    """Bug: gold is of another prompt, of a text with its E, or in points where standard deviations are due."""
    encode, end = finished.tokenizer.encode_ordinary, end_id(finished.tokenizer)
    texts = [("i saw the new film with my boss yesterday .", " the plot was brilliant ."),
             ("we booked the new hotel with my boss yesterday .", " the plot was brilliant ."),
             ("i saw the new film with my boss yesterday .", " the plot was")]
    prompts, responses = [encode(prompt) for prompt, _ in texts], [encode(response) + [end] for _, response in texts]
    raw = finished.raw_gold(prompts, responses).tolist()
    assert raw == [world.gold(prompt, response) for prompt, response in texts] and len(set(raw)) == 3
    expected = [(points - files.scale["mean"]) / files.scale["std"] for points in raw]
    assert finished.gold(prompts, responses).tolist() == pytest.approx(expected, abs=1e-6)
    finished.config.data = "own.jsonl"
    for gold in (finished.gold(prompts, responses), finished.raw_gold(prompts, responses)):
        assert len(gold) == 3 and gold.isnan().all()  # the oracle knows nothing about these texts


def test_the_oracle_as_the_scorer(finished):
    """Bug: with --reward-from gold the oracle reads the padding, another row's prompt, or the prompt as the answer."""
    finished.config.reward_from = "gold"
    prompts = finished.prompts[1][:6]
    sampler = torch.Generator(finished.device).manual_seed(0)
    rollout = generate(finished.load_network("sft"), prompts, 12, generator=sampler)
    assert torch.equal(finished.scorer()(rollout).cpu(), finished.gold(prompts, rollout.response_ids()))
    asked = []
    fake = SimpleNamespace(config=finished.config, gold=lambda *lists: asked.append(lists) or torch.zeros(2))
    Run.scorer(fake)(collate([[1, 2], [3]], [[4], [5, 6]], pad=9))
    assert asked == [([[1, 2], [3]], [[4], [5, 6]])]
