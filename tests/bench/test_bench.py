"""The benchmarks: operations against loops, turns and ratios by hand, and the weights that the peers get."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import is_pad, make_batch, random_batch, rows_of, tiny_gpt

from bench import peers, speed, tasks, worker
from bench.gpt2 import gpt2_sizes, to_gpt2
from bench.worker import ask, start_worker, take_turns
from model import GPTConfig, response_logprobs


def test_operations_are_those_of_a_loop_over_tokens():
    """Bug: operations that count padding, or miss attention, the head, a layer, an epoch or a network."""
    batch, C = random_batch(3), tasks.CONFIG.n_embd
    layers = head = 0
    for prompt, response in rows_of(batch):
        for seen in range(1, len(prompt) + len(response) + 1):
            matrices = 2 * (3 * C * C + C * C + 4 * C * C + 4 * C * C)
            layers += tasks.CONFIG.n_layer * (matrices + 2 * C * seen + 2 * seen * C)  # scores, and their mixture
        head += 2 * C * tasks.CONFIG.vocab_size * len(response)
    assert tasks.forward_flops(batch) == layers + head
    assert tasks.forward_flops(batch, head=False) == layers
    networks = 2 * (layers + head) + 2 * layers  # rollout and reference; reward model and critic
    assert tasks.ppo_flops(batch) == networks + tasks.EPOCHS * 3 * (2 * layers + head)


@pytest.mark.parametrize("rate, here", [(None, 2000.0), ("tokens", 4.0)])
def test_a_ratio_above_one_means_that_we_are_faster(rate, here, capsys):
    """Bug: ratios turned upside down, for times or for rates; a spread that is not of neighbouring steps."""
    ours = [dict(seconds=s, limit=10.0, memory=None, tokens=8) for s in (1.0, 2.0, 4.0)]
    theirs = [dict(seconds=s, limit=10.0, memory=None, tokens=8) for s in (4.0, 4.0, 4.0)]
    assert speed.times_faster(ours, theirs, rate) == (2.0, 1.0, 4.0)
    speed.report("x", ours, dict(peer=theirs), 5.0, rate)
    line = capsys.readouterr().out
    assert f"{here:,.0f} " in line and "25% of limit  peer" in line and "2.0x faster (1.0 to 4.0)" in line


def test_turns_are_taken_and_the_first_step_is_thrown_away(monkeypatch, capsys):
    """Bug: the warm-up step is counted, on one side or on both; a peer's step is timed as ours; a failure is a step."""
    clock, log = [0.0], []

    def do(seconds):
        clock[0] += seconds

    def run(steps, tick):
        for i in range(steps):
            log.append(("ours", i))
            do(100.0 if i == 0 else 1.0)
            tick(tokens=i)

    def answer(name, **order):
        log.append((name, order))
        do(7.0)
        return dict(error="no such thing") if name == "broken" else dict(seconds=float(len(log)))

    monkeypatch.setattr(worker, "clock", lambda device: clock[0])
    monkeypatch.setattr(worker, "product_rate", lambda device: do(3.0) or 5.0)
    monkeypatch.setattr(worker, "ask", answer)
    ours, theirs = take_turns(run, 2, "cpu", dict(peer="peer", broken="broken"), task="ppo", batch=4)
    assert ours == [dict(tokens=i, seconds=1.0, memory=None, limit=5.0) for i in (1, 2)]
    assert log[:2] == [(name, dict(task="ppo", batch=4, steps=3)) for name in ("peer", "broken")]
    assert log[2:] == [each for i in range(3) for each in (("ours", i), ("peer", {}))]
    assert theirs == dict(peer=[dict(seconds=6.0, limit=5.0), dict(seconds=8.0, limit=5.0)])
    assert "broken is left out: no such thing" in capsys.readouterr().out


def test_every_task_of_ours_calls_tick_once_a_step(monkeypatch):
    """Bug: a task that does more or fewer steps than the peers, or on other rows: neighbours in time would differ."""
    small = GPTConfig(vocab_size=12, block_size=20, n_layer=1, n_head=1, n_embd=8)
    for name, value in (("CONFIG", small), ("CAP", 3), ("PAIRS", 2), ("BATCH", 4), ("EPOCHS", 2)):
        monkeypatch.setattr(tasks, name, value)
    configs, train = [], tasks.train_ppo
    monkeypatch.setattr(tasks, "train_ppo", lambda *args, **seed: configs.append(args[5]) or train(*args, **seed))
    policy, prompts = tasks.make_policy(), tasks.make_prompts(6)
    pairs = tasks.make_pairs(policy, prompts)
    assert [pair["prompt"] for pair in pairs] == prompts
    assert all(pair[side][-1] == policy.end for pair in pairs for side in ("chosen", "rejected"))
    for task, data in ((tasks.rollouts, prompts), (tasks.ppo_iterations, prompts), (tasks.dpo_steps, pairs),
                       (tasks.reward_steps, pairs), (tasks.forward_backwards, random_batch(0, vocab=12))):
        ticks = []
        task(policy, data, steps=2, tick=lambda **counts: ticks.append(counts))  # noqa: B023
        assert len(ticks) == 2, task
        if task is tasks.rollouts:
            assert all(4 <= counts["tokens"] <= 12 for counts in ticks)
    assert [(c.ppo_batch, c.minibatch, c.ppo_epochs, c.response_tokens) for c in configs] == [(4, 4, 2, 3)]


@pytest.mark.slow
def test_a_peer_answers_once_a_step_and_says_what_it_cannot_do():
    """Bug: lines that get out of step: a library's output between the answers, or an error mistaken for a step."""
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
    lines = "".join(json.dumps(order) + "\n" for order in orders)
    command = [sys.executable, "-c", script, str(Path(peers.__file__).parent)]
    done = subprocess.run(command, input=lines, capture_output=True, text=True, check=True)
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert [answer.get("i") for answer in answers] == [None, None, 0, 1, None, None, 0]
    assert answers[0] == dict(hello=1) and answers[1] == dict(ready=True) == answers[5]
    assert answers[4] == dict(error="fail: RuntimeError: no such thing")


def test_a_peer_that_ends_says_why(tmp_path):
    """Bug: a peer that dies, and the benchmark waits for ever, or ends without its other rows."""
    script = tmp_path / "dies.py"
    script.write_text("print('{}', flush=True); input(); raise SystemExit('out of memory')")
    with start_worker(sys.executable, script, {}) as peer:
        for task in ("rollout", "dpo"):
            assert ask(peer, task=task, steps=1) == dict(error="its process ended: out of memory")
    assert peer.versions == {} and peer.process.returncode is not None
    with pytest.raises(SystemExit, match="no/python: No such file"):
        with start_worker("no/python", script, {}):
            pass


@pytest.mark.slow
def test_gpt2_of_hugging_face_gives_the_same_logits():
    """Bug: not GPT-2: a formula, eps, name or orientation differs from the published model's; also with padding."""
    transformers = pytest.importorskip("transformers", reason="parity with GPT-2 needs transformers")
    ours = tiny_gpt(3, torch.float32, vocab=37, block=20, layers=3, heads=4, embd=24, std=0.2)
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**gpt2_sizes(ours.config))).eval()
    assert set(theirs.state_dict()) == set(to_gpt2(ours))
    theirs.load_state_dict(to_gpt2(ours))
    ids = torch.randint(37, (4, 15), generator=torch.Generator().manual_seed(0))
    batch = make_batch([[1, 2, 3, 4], [5], [6, 7]], [[8, 9], [10, 11, 12, 13], [14]], P=6, pad=36)
    real = ~is_pad(batch)                                                                     # (B, T)
    positions = (real.cumsum(dim=1) - 1).clamp(min=0)                                         # (B, T)
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(ids).logits, atol=1e-5, rtol=1e-5)
        logits = theirs(batch.ids, attention_mask=real.long(), position_ids=positions).logits
        torch.testing.assert_close(ours(batch.ids, batch.start)[real], logits[real], atol=1e-5, rtol=1e-5)
        logp = logits[:, 5:-1].log_softmax(-1).gather(2, batch.responses[..., None])[..., 0]  # (B, R)
        torch.testing.assert_close(response_logprobs(ours, batch), logp * batch.mask, atol=1e-5, rtol=1e-5)
