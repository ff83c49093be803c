"""
The benchmarks: operations against loops, arrivals by hand, and the weights that the peers get against their networks.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import close, make_batch, random_batch, rows_of, tiny_gpt

from bench import peers, speed, tasks
from bench.gpt2 import peer_sizes
from bench.race import Scale, Step, arrival, arrival_seconds, reward_weights, shares
from bench.worker import ask, start_worker
from model import GPTConfig
from reward import RewardModel, normalise

# ---- what is counted -------------------------------------------------------------------------------------------------

def loop_flops(prompt, response):
    """Count the operations of one sequence token by token: those of the layers, and those of the output matrix."""
    C = tasks.CONFIG.n_embd
    layers = 0
    for seen in range(1, len(prompt) + len(response) + 1):
        matrices = 2 * (3 * C * C + C * C + 4 * C * C + 4 * C * C)
        scores = 2 * C * seen
        mixture = 2 * seen * C
        layers += tasks.CONFIG.n_layer * (matrices + scores + mixture)
    head = 2 * C * tasks.CONFIG.vocab_size * len(response)
    return layers, head


def test_operations_are_those_of_a_loop_over_tokens():
    """Operations that count padding, or miss attention, the head or a layer: the share of the limit would be wrong."""
    batch = random_batch(3)
    layers = head = 0
    for prompt, response in rows_of(batch):
        row_layers, row_head = loop_flops(prompt, response)
        layers += row_layers
        head += row_head
    assert tasks.forward_flops(batch) == layers + head
    assert tasks.forward_flops(batch, head=False) == layers


def test_decoding_reads_what_a_loop_over_steps_reads():
    """Bytes of the cache counted for rows that have ended, for padding, or once for keys and values together."""
    batch = random_batch(4)
    config = tasks.CONFIG
    matrices = 12 * config.n_layer * config.n_embd ** 2 + config.n_embd * config.vocab_size
    numbers = 0
    for step in range(batch.R):
        numbers += matrices
        for prompt, response in rows_of(batch):
            if 0 < step < len(response):  # the first step reads the prompt itself
                numbers += config.n_layer * 2 * config.n_embd * (len(prompt) + step)
    assert tasks.decode_bytes(batch) == 4 * numbers


def test_the_policy_of_the_benchmark_ends_with_the_given_probability():
    """Responses that all run to the cap, or all end at once. Then rows that end at different times are not measured."""
    model = tasks.make_policy(1 / 30, "cpu")
    ids = torch.randint(tasks.END, (8, 20), generator=torch.Generator().manual_seed(0))
    logp = torch.log_softmax(model(ids), dim=-1)[..., tasks.END]
    assert 1 / 40 < logp.mean().exp() < 1 / 20


def test_a_ratio_above_one_means_that_we_are_faster():
    """Ratios turned upside down, for times or for rates; or a spread that is not that of neighbouring steps."""
    ours = [dict(seconds=s, limit=10.0, memory=None, tokens=8) for s in (1.0, 2.0, 4.0)]
    theirs = [dict(seconds=s, limit=10.0, memory=None, tokens=8) for s in (4.0, 4.0, 4.0)]
    for rate, median in ((None, 2000.0), ("tokens", 4.0)):
        row = speed.compare("x", ours, dict(peer=theirs), 5.0, rate)
        peer = row["peers"]["peer"]
        assert (peer["ratio"], peer["ratio_lowest"], peer["ratio_highest"]) == (2.0, 1.0, 4.0)
        assert row["here"]["median"] == median and row["here"]["share_of_limit"] == 0.25


# ---- the conversation with another process ---------------------------------------------------------------------------

@pytest.mark.slow
def test_every_task_of_ours_calls_tick_once_a_step(monkeypatch):
    """A task that does more or fewer steps than the peers, so that neighbours in time are other steps."""
    small = GPTConfig(vocab_size=12, block_size=20, n_layer=1, n_head=1, n_embd=8)
    for name, value in (("CONFIG", small), ("END", 10), ("PAD", 11), ("CAP", 3), ("PAIRS", 2)):
        monkeypatch.setattr(tasks, name, value)
    monkeypatch.setitem(tasks.SETTINGS, "batch_size", 2)
    monkeypatch.setitem(tasks.SETTINGS, "ppo_epochs", 1)
    policy = tasks.make_policy(1 / 30, "cpu")
    prompts = tasks.make_prompts(6)
    pairs = tasks.make_pairs(policy, prompts)
    batch = make_batch(prompts[:2], [pair["chosen"] for pair in pairs[:2]], pad=tasks.PAD)
    ticks = []

    def tick(**counts):
        ticks.append(counts)

    tasks.rollouts(policy, prompts, 2, tick)
    assert len(ticks) == 2 and len(prompts) <= ticks[0]["tokens"] <= 3 * len(prompts)
    tasks.ppo_iterations(policy, prompts, 2, tick, batch=4, cap=3)
    assert len(ticks) == 4
    tasks.dpo_steps(policy, pairs, 2, tick)
    assert len(ticks) == 6
    tasks.reward_steps(policy, pairs, 3, tick)
    assert len(ticks) == 9
    tasks.forward_backwards(policy, batch, 1, tick)
    assert len(ticks) == 10


@pytest.mark.slow
def test_a_peer_answers_once_a_step_and_says_what_it_cannot_do():
    """Lines that get out of step: a library's output between the answers, or an error that is mistaken for a step."""
    script = (
        "import sys; sys.path.insert(0, sys.argv[1]); import peers\n"
        "def count(setup, order, tick):\n"
        "    def run():\n"
        "        for i in range(order['steps']):\n"
        "            print('noise'); tick(i=i)\n"
        "    return run\n"
        "def fail(setup, order, tick):\n"
        "    raise RuntimeError('no such thing')\n"
        "peers.converse(dict(device='cpu', threads=1), dict(count=count, fail=fail), hello=1)\n")
    orders = [dict(task="count", steps=2), {}, {}, dict(task="fail", steps=2), dict(task="count", steps=1), {}]
    text = "".join(json.dumps(order) + "\n" for order in orders)
    folder = str(Path(peers.__file__).parent)
    command = [sys.executable, "-c", script, folder]
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=True)
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert [answer.get("i") for answer in answers] == [None, None, 0, 1, None, None, 0]
    assert answers[0] == dict(hello=1) and answers[1] == dict(ready=True) == answers[5]
    assert answers[4] == dict(error="fail: RuntimeError: no such thing")
    assert all(answer["seconds"] >= 0 for answer in answers if "i" in answer)


def test_a_peer_that_ends_says_why(tmp_path):
    """A peer that dies: the benchmark would wait for ever, or end without its other rows."""
    script = tmp_path / "dies.py"
    script.write_text("print('{}', flush=True); input(); raise SystemExit('out of memory')")
    with start_worker(sys.executable, script, {}) as worker:
        assert worker.versions == {}
        assert ask(worker, task="rollout", steps=1) == dict(error="its process ended: out of memory")
        assert ask(worker, task="dpo", steps=1) == dict(error="its process ended: out of memory")
    assert worker.process.returncode is not None
    with pytest.raises(SystemExit, match="no/python: No such file"):
        with start_worker("no/python", script, {}):
            pass


# ---- the race --------------------------------------------------------------------------------------------------------

def test_a_goal_is_reached_when_the_mean_of_five_reaches_it():
    """An arrival by one lucky rollout, in a window that is not full, or with the seconds of later iterations."""
    scale = Scale(sft=0.0, optimum=2.0)
    objectives = [9.0, 0.0, 0.0, 0.0, 0.0, 2.0, 2.0, 2.0, 2.0, 2.0, 0.0]
    assert shares(objectives, scale) == pytest.approx([0, 0, 0, 0, 0.9, 0.2, 0.4, 0.6, 0.8, 1.0, 0.8])
    # the first iteration is slow, and the median ignores it
    steps = [Step(9.0 if i == 0 else 0.5, objective) for i, objective in enumerate(objectives)]
    assert arrival(steps, 0.8, scale) == (5, 2.5)
    assert arrival(steps, 0.95, scale) == (10, 5.0)
    assert arrival(steps, 1.1, scale) is None
    assert arrival([], 0.8, scale) is None
    assert arrival_seconds(steps, 0.8, scale) == 2.5
    assert arrival_seconds(steps, 1.1, scale) == float("inf")
    assert shares([1.0] * 5, Scale(-1.0, 3.0)) == [0.0, 0.0, 0.0, 0.0, 0.5]


@pytest.mark.slow
def test_the_reward_model_of_the_peers_gives_the_same_scores():
    """A race for another reward: bias, mean or deviation of the scores lost in a network that has no place for them."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = RewardModel(tiny_gpt(1, torch.float32))
    torch.nn.init.constant_(model.score.bias, 0.7)
    normalise(model, [random_batch(5)])
    config = transformers.GPT2Config(**peer_sizes(model.trunk.config), num_labels=1, pad_token_id=0,
                                     resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    peer = transformers.GPT2ForSequenceClassification(config).eval()
    assert peer.load_state_dict(reward_weights(model), strict=False).missing_keys == []
    for prompt, response in rows_of(random_batch(6)):
        hidden = peer.transformer(torch.tensor([prompt + response])).last_hidden_state        # (1, T, C)
        close(peer.score(hidden)[0, -1, 0], model(make_batch([prompt], [response]))[0], 1e-5)
