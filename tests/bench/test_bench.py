"""The benchmarks: operations against loops, turns and ratios by hand, and the weights that the peers get."""

import contextlib
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import random_batch, rows_of, tiny_gpt

from bench import peers, pretrained, speed, tasks, worker
from bench.worker import ask, start_worker, take_turns
from evaluate import sample_policy
from model import GPT, GPTConfig


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


@pytest.mark.parametrize("rate", [None, "tokens"])
def test_a_ratio_above_one_means_that_we_are_faster(rate):
    """Bug: ratios turned upside down, for times or for rates; a spread that is not of neighbouring steps."""
    ours = [dict(seconds=s, limit=10.0, tokens=8) for s in (1.0, 2.0, 4.0)]
    theirs = [dict(seconds=s, limit=10.0, tokens=8) for s in (4.0, 4.0, 4.0)]
    assert speed.times_faster(ours, theirs, rate) == (2.0, 1.0, 4.0)
    assert speed.share_of_limit(ours, 5.0) == 0.25


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
    for name, value in (("CONFIG", small), ("CAP", 3), ("PAIRS", 2), ("BATCH", 4), ("EPOCHS", 3)):
        monkeypatch.setattr(tasks, name, value)
    configs, train = [], tasks.train_ppo
    monkeypatch.setattr(tasks, "train_ppo", lambda *args, **seed: configs.append(args[5]) or train(*args, **seed))
    policy, prompts = tasks.make_policy(), tasks.make_prompts(6)
    pairs = tasks.make_pairs(policy, prompts)
    assert [pair["prompt"] for pair in pairs] == prompts
    for side, seed in (("chosen", 1), ("rejected", 2)):
        responses = next(sample_policy(policy, prompts, 3, 1.0, seed)).response_ids()
        assert [pair[side] for pair in pairs] == [[*ids[:-1], policy.end] for ids in responses]
    for task, data in ((tasks.rollouts, prompts), (tasks.ppo_iterations, prompts), (tasks.dpo_steps, pairs)):
        ticks = []
        task(policy, data, steps=2, tick=lambda **counts: ticks.append(counts))  # noqa: B023
        assert len(ticks) == 2, task
        if task is tasks.rollouts:
            assert all(4 <= counts["tokens"] <= 12 for counts in ticks)
    assert [(c.ppo_batch, c.minibatch, c.ppo_epochs, c.response_tokens) for c in configs] == [(4, 4, 3, 3)]


def test_the_operations_of_a_step(monkeypatch):
    """Bug: two batches or all pairs count as one step."""
    rows, policy = [], tiny_gpt(0, torch.float32)
    monkeypatch.setattr(speed, "sample_policy", lambda *args, size: iter([random_batch(B=6)]))
    monkeypatch.setattr(speed, "forward_flops", len)  # one operation a row
    monkeypatch.setattr(tasks, "ppo_flops", len)
    monkeypatch.setattr(speed, "take_turns", lambda *args, **order: (order["task"], {}))
    monkeypatch.setattr(speed, "report", lambda name, ours, theirs, flops, rate: rows.append((ours, flops)))
    speed.measure(policy, [], [dict(prompt=[1], chosen=[2], rejected=[3])] * 5, [], 1, "cpu")
    assert rows == [("rollout", 3), ("ppo", 3), ("dpo", 3 * 2 * tasks.PAIRS)]  # forward and backward, of two responses


def test_both_sides_get_the_same(monkeypatch):
    """Bug: other prompts, pairs, weights, ends or threads for the peers, dropout, too few pairs, a peer left out."""
    pytest.importorskip("transformers")
    setups, measured = [], []

    @contextlib.contextmanager
    def start(python, script, setup):
        setups.append((python, script, setup))
        yield SimpleNamespace(versions=dict(transformers="4", trl=None))

    monkeypatch.setattr(speed, "start_worker", start)
    monkeypatch.setattr(speed, "product_rate", lambda device, times: 2e9)
    monkeypatch.setattr(tasks, "make_pairs", lambda policy, prompts: [dict(prompt=prompt) for prompt in prompts])
    monkeypatch.setattr(speed, "measure", lambda *arguments: measured.extend(arguments))
    speed.main(["--peers", "a", "b", "--repeats", "9", "--threads", "1"])
    policy, prompts, pairs, workers, steps, device = measured
    assert [(python, script) for python, script, _ in setups] == [("a", "peers.py"), ("b", "peers.py")]
    setup = setups[0][2]
    assert (len(prompts), len(pairs), len(workers), steps, device) == (320, 320, 2, 9, "cpu")
    theirs, ids = peers.make_network(setup, "GPT2LMHeadModel"), torch.tensor([prompts[0]])
    torch.testing.assert_close(theirs.train()(ids).logits, policy(ids), atol=1e-5, rtol=1e-5)
    assert peers.make_tokenizer(setup)(peers.to_text(prompts[0]))["input_ids"] == prompts[0]
    expected = dict(prompts=prompts, pairs=pairs, cap=40, end=558, pad=559, lr=1e-6, device="cpu", threads=1)
    assert {name: setup[name] for name in expected} == expected


def test_a_rollout_of_a_peer(monkeypatch):
    """Bug: padding on the right, another cap or distribution, tokens that are counted after E."""
    asked, ticks = [], []

    def generate(ids, attention_mask, **settings):
        asked.append((ids.tolist(), attention_mask.tolist(), settings))
        return torch.tensor([[1, 2, 3, 7, 7, 8, 8], [8, 3, 4, 5, 6, 1, 2]])

    model = SimpleNamespace(generate=generate, eval=lambda: model)
    monkeypatch.setattr(peers, "make_network", lambda setup, kind: model)
    setup = dict(end=7, pad=8, device="cpu", prompts=[[1, 2], [3], [4, 5]], cap=5)
    peers.rollout(setup, dict(batch=2, steps=2), lambda **counts: ticks.append(counts))()
    settings = dict(max_new_tokens=5, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, use_cache=True,
                    eos_token_id=7, pad_token_id=8)
    assert asked == [([[1, 2], [8, 3]], [[1, 1], [0, 1]], settings)] * 2
    assert ticks == [dict(tokens=2 + 5)] * 2


@pytest.mark.parametrize("loop, passes", [("rloo", 2 + 2 + 6), ("ppo", 2 + 2 + 6 + 2 + 6)])
def test_the_row_of_a_pretrained_model(loop, passes, monkeypatch):
    """Bug: the warm-up is counted, responses for all tokens in the share of the peak, a reward model for the critic."""
    policy, loaded = tiny_gpt(0, torch.float32), []
    clock = iter([0.0, 50.0, 60.0, 62.0, 70.0])  # the first iteration takes 50 seconds, the second 2
    monkeypatch.setattr(GPT, "model", property(lambda self: self), raising=False)
    tokenizer = SimpleNamespace(encode_ordinary=lambda question: [1, 2, 3])
    monkeypatch.setattr(pretrained, "load_pretrained", lambda *args: loaded.append(args) or (policy, tokenizer))
    monkeypatch.setattr(pretrained.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(pretrained, "product_rate", lambda device, times, dtype: 1e6)
    monkeypatch.setattr(pretrained, "train_grpo" if loop == "ppo" else "train_ppo", None)
    command = SimpleNamespace(device="cpu", micro_batch=3, batch=8, iterations=2, tokens=5)
    row = pretrained.measure("folder", False, 16, loop, command)
    assert loaded == [("folder", 16, torch.float32, "cpu")] and policy.micro_batch == 3
    weights = sum(weight.numel() for weight in policy.parameters())
    assert row["seconds"] == 2 and 4 <= row["rate"] <= 20 and row["error"] < 1e-5
    assert row["share"] == pytest.approx((2 * row["rate"] + 8 * 3) * weights * passes / 2 / 1e6)


def test_the_limit_is_the_fastest_of_several_products(monkeypatch):
    """Bug: the slowest, a multiplication without its addition."""
    times, products = iter([0.0, 3.0, 4.0, 6.0, 7.0, 12.0]), []
    monkeypatch.setattr(worker, "clock", lambda device: next(times))
    monkeypatch.setattr(worker.torch, "mm", lambda a, b, out: products.append(a.shape))
    assert worker.product_rate("cpu", 3) == 2 * 2048 ** 3 / 2 and products == [(2048, 2048)] * 3


def test_a_peer_answers_once_a_step_and_says_what_it_cannot_do():
    """Bug: a library's output between the answers, an error that counts as a step, the wait for an order is timed."""
    script = (  # torch has no content, so it starts at once; the clock counts how often it is asked, and the orders
        "import itertools, sys; from types import SimpleNamespace as Module\n"
        "cuda = Module(synchronize=int, reset_peak_memory_stats=int, max_memory_allocated=lambda: 7)\n"
        "sys.modules['torch'] = Module(set_num_threads=int, manual_seed=int, cuda=cuda)\n"
        "sys.path.insert(0, sys.argv[1]); import peers\n"
        "clock, read = itertools.count(), sys.stdin.readline\n"
        "sys.stdin = Module(readline=lambda: [read(), next(clock)][0])\n"
        "peers.time = Module(perf_counter=clock.__next__)\n"
        "def count(setup, order, tick):\n"
        "    def run():\n"
        "        for i in range(order['steps']):\n"
        "            print('noise'); tick(i=i)\n"
        "    return run\n"
        "def fail(setup, order, tick):\n"
        "    raise RuntimeError('no such thing')\n"
        "peers.converse(dict(device='cuda', threads=1), dict(count=count, fail=fail), hello=1)\n")
    orders = [dict(task="count", steps=2), {}, {}, dict(task="fail", steps=2), dict(task="count", steps=1), {}]
    lines = "".join(json.dumps(order) + "\n" for order in orders)
    command = [sys.executable, "-c", script, str(Path(peers.__file__).parent)]
    done = subprocess.run(command, input=lines, capture_output=True, text=True, check=True)
    step = dict(seconds=1, memory=7)
    assert [json.loads(line) for line in done.stdout.splitlines()] == [
        dict(hello=1), dict(ready=True), dict(step, i=0), dict(step, i=1),
        dict(error="fail: RuntimeError: no such thing"), dict(ready=True), dict(step, i=0)]


def test_a_peer_that_ends_says_why(tmp_path):
    """Bug: a peer that dies, and the benchmark waits for ever, or ends without its other rows."""
    script = tmp_path / "dies.py"
    script.write_text("print('{}', flush=True); input(); raise SystemExit('a warning\\nout of memory')")
    with start_worker(sys.executable, script, {}) as peer:
        for task in ("rollout", "dpo"):
            assert ask(peer, task=task, steps=1) == dict(error="its process ended: out of memory")
    assert peer.versions == {} and peer.process.returncode is not None
