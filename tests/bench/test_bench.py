"""The benchmarks: operations against loops, turns and ratios by hand, and the weights that the peers get."""

import contextlib
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import is_pad, make_batch, random_batch, rows_of, tiny_gpt

from bench import peers, pretrained, speed, tasks, worker
from bench.gpt2 import gpt2_sizes, to_gpt2
from bench.worker import ask, start_worker, take_turns
from evaluate import sample_policy
from model import GPT, GPTConfig, response_logprobs


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
    for side, seed in (("chosen", 1), ("rejected", 2)):
        responses = next(sample_policy(policy, prompts, 3, 1.0, seed)).response_ids()
        assert [pair[side] for pair in pairs] == [[*ids[:-1], policy.end] for ids in responses]
    for task, data in ((tasks.rollouts, prompts), (tasks.ppo_iterations, prompts), (tasks.dpo_steps, pairs)):
        ticks = []
        task(policy, data, steps=2, tick=lambda **counts: ticks.append(counts))  # noqa: B023
        assert len(ticks) == 2, task
        if task is tasks.rollouts:
            assert all(4 <= counts["tokens"] <= 12 for counts in ticks)
    assert [(c.ppo_batch, c.minibatch, c.ppo_epochs, c.response_tokens) for c in configs] == [(4, 4, 2, 3)]


def test_what_is_compared(monkeypatch):
    """Bug: another task or batch for the peers than for us, the operations of both batches or of all pairs a step."""
    for name, value in (("CAP", 3), ("PAIRS", 2), ("BATCH", 4), ("EPOCHS", 5)):
        monkeypatch.setattr(tasks, name, value)
        monkeypatch.setattr(speed, name, value)
    monkeypatch.setattr(speed, "forward_flops", len)
    monkeypatch.setattr(tasks, "ppo_flops", lambda batch: 100 * len(batch))
    policy, prompts = tasks.make_policy(), tasks.make_prompts(8)
    pairs = tasks.make_pairs(policy, prompts)
    turns, reports = [], []
    monkeypatch.setattr(speed, "take_turns", lambda *args, **order: turns.append((args, order)) or ("ours", "theirs"))
    monkeypatch.setattr(speed, "report", lambda *args: reports.append(args))
    old, new = [SimpleNamespace(versions=dict(transformers=number, trl=trl)) for number, trl in ((4, 1), (5, None))]
    speed.measure(policy, prompts, pairs, [old, new], 7, "cpu")
    both, trl = {"transformers 4": old, "transformers 5": new}, {"trl 1": old}
    for (run, *rest), _ in turns:
        assert run.args == (policy, pairs if run.func is tasks.dpo_steps else prompts) and rest[:2] == [7, "cpu"]
    assert [(run.func, peers, order) for (run, *_, peers), order in turns] == [
        (tasks.rollouts, both, dict(task="rollout", batch=4)),
        (tasks.ppo_iterations, trl, dict(task="ppo", batch=4, epochs=5)),
        (tasks.dpo_steps, trl, dict(task="dpo", batch=2))]
    # 4 rows of a rollout; 2 pairs of two rows, forward and backward
    assert [(flops, *rate) for _, _, _, flops, *rate in reports] == [(4, "tokens"), (400, None), (12, None)]


def test_both_sides_get_the_same(monkeypatch, capsys):
    """Bug: other prompts, pairs, weights, ends or threads for the peers; too few pairs; a peer that is left out."""
    setups, measured = [], []

    @contextlib.contextmanager
    def start(python, script, setup):
        setups.append((python, script, setup))
        versions = dict(transformers="4", trl=None) if python == "a" else {}
        yield SimpleNamespace(versions=versions, last_line=lambda: "why")

    monkeypatch.setattr(speed, "start_worker", start)
    monkeypatch.setattr(speed, "product_rate", lambda device, times: 2e9)
    monkeypatch.setattr(tasks, "make_pairs", lambda policy, prompts: [dict(prompt=prompt) for prompt in prompts])
    monkeypatch.setattr(speed, "measure", lambda *arguments: measured.extend(arguments))
    speed.main(["--peers", "a", "b", "--repeats", "9", "--threads", "1"])
    policy, prompts, pairs, workers, steps, device = measured
    assert [(python, script) for python, script, _ in setups] == [("a", "peers.py"), ("b", "peers.py")]
    setup = setups[0][2]
    assert (len(prompts), len(pairs), len(workers), steps, device) == (320, 320, 2, 9, "cpu")
    assert all(torch.equal(setup["weights"][name], weight) for name, weight in to_gpt2(policy).items())
    expected = dict(sizes=gpt2_sizes(policy.config), prompts=prompts, pairs=pairs, cap=40, end=558, pad=559, lr=1e-6,
                    device="cpu", threads=1)
    assert {name: setup[name] for name in expected} == expected
    out = capsys.readouterr().out
    assert "a lacks trl; " in out and "b is left out: why" in out and "2 GFLOP/s" in out
    with pytest.raises(SystemExit):
        speed.main(["--repeats", "0"])


class Kept:
    """In the place of any class of the libraries: it keeps what it is given."""

    missing = ["score.weight"]

    def __init__(self, *args, **kwargs):
        self.args, self.kwargs, self.asked = args, kwargs, []

    def load_state_dict(self, weights, strict):
        self.weights = weights
        return SimpleNamespace(missing_keys=self.missing)

    def to(self, device):
        return self

    def eval(self):
        return self

    def generate(self, ids, **settings):
        GENERATED.append((ids.tolist(), settings.pop("attention_mask").tolist(), settings))
        return torch.tensor([[1, 2, 3, 7, 7, 8, 8], [8, 3, 4, 5, 6, 1, 2]])

    def train(self):
        pass


GENERATED = []
SETUP = dict(sizes=dict(vocab_size=9), end=7, pad=8, weights="weights", device="cpu", prompts=[[1, 2], [3], [4, 5]],
             pairs=[dict(prompt=[1, 2], chosen=[3, 7], rejected=[4, 5, 7])], cap=5, folder="here", lr=0.1)


@pytest.fixture
def libraries(monkeypatch):
    """transformers, TRL and datasets that compute nothing, and the ticks."""
    ticks = []
    names = dict(transformers=("GPT2Config", "GPT2LMHeadModel", "GPT2ForSequenceClassification"),
                 trl=("PPOConfig", "PPOTrainer", "DPOConfig", "DPOTrainer"))
    for library, classes in names.items():
        made = {name: type(name, (Kept,), {}) for name in classes}
        monkeypatch.setitem(sys.modules, library, SimpleNamespace(**made, TrainerCallback=object))
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(Dataset=SimpleNamespace(from_list=list)))
    monkeypatch.setattr(peers, "make_tokenizer", lambda setup: "tokenizer")
    return ticks, lambda **counts: ticks.append(counts)


def test_a_rollout_of_a_peer(libraries):
    """Bug: padding on the right, another cap or distribution, tokens that are counted after E, other weights."""
    ticks, tick = libraries
    peers.rollout(SETUP, dict(batch=2, steps=2), tick)()
    settings = dict(max_new_tokens=5, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, use_cache=True,
                    eos_token_id=7, pad_token_id=8)
    assert GENERATED == [([[1, 2], [8, 3]], [[1, 1], [0, 1]], settings)] * 2
    assert ticks == [dict(tokens=2 + 5)] * 2
    model = peers.make_network(SETUP, "GPT2LMHeadModel")
    config = dict(vocab_size=9, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, num_labels=1, bos_token_id=7,
                  eos_token_id=7, pad_token_id=8)
    assert model.args[0].kwargs == config and model.weights == "weights"


def test_trainers_of_a_peer(libraries, monkeypatch):
    """Bug: another batch, rate, number of steps or epochs than ours, texts with E twice, the sides exchanged."""
    ticks, tick = libraries
    common = dict(learning_rate=0.1, bf16=False, gradient_checkpointing=False, use_cpu=True)

    def check(trainer, config, **expected):
        expected |= common
        assert {name: config.kwargs[name] for name in expected} == expected
        trainer.kwargs["callbacks"][0].on_step_end()

    trainer = peers.dpo(SETUP, dict(batch=3, steps=4), tick).__self__
    policy, reference, config = trainer.args
    check(trainer, config, per_device_train_batch_size=3, max_steps=4, precompute_ref_log_probs=True)
    assert type(policy).__name__ == "GPT2LMHeadModel" and reference is None
    assert trainer.kwargs["train_dataset"] == [dict(prompt="t1 t2", chosen=" t3", rejected=" t4 t5")]

    trainer = peers.ppo(SETUP, dict(batch=3, steps=4, epochs=2), tick).__self__
    config, tokenizer, policy, reference, reward_model, data, critic = trainer.args
    check(trainer, config, per_device_train_batch_size=3, num_mini_batches=1, num_ppo_epochs=2, total_episodes=12,
          response_length=5, temperature=1.0, stop_token="eos")
    assert tokenizer == "tokenizer" and data == [dict(input_ids=prompt) for prompt in SETUP["prompts"]]
    assert [type(x).__name__ for x in (policy, reference, reward_model, critic)] == [
        *["GPT2LMHeadModel"] * 2, *["GPT2ForSequenceClassification"] * 2]
    assert policy is not reference and reward_model is not critic and ticks == [{}, {}]
    monkeypatch.delattr(sys.modules["trl"], "PPOTrainer")
    with pytest.raises(RuntimeError, match="no trl.PPOTrainer"):
        peers.ppo(SETUP, dict(batch=3, steps=4, epochs=2), tick)
    monkeypatch.setattr(Kept, "missing", ["h.0.weight"])
    with pytest.raises(RuntimeError, match="lacks: .'h.0.weight'"):
        peers.make_network(SETUP, "GPT2LMHeadModel")


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


def test_a_pretrained_model_is_measured_in_eight_ways(monkeypatch, capsys):
    """Bug: an option that goes nowhere, a row under the name of another."""
    asked = []

    def measure(folder, half, rank, loop, command):
        asked.append((folder, half, rank, loop))
        assert (command.batch, command.tokens, command.micro_batch, command.iterations) == (8, 32, 2, 3)
        return dict(seconds=len(asked), rate=30.0, share=0.25, peak=4.0, error=1e-6)

    monkeypatch.setattr(pretrained, "measure", measure)
    pretrained.main(["folder", "--batch", "8", "--micro-batch", "2"])
    assert asked == [("folder", half, rank, loop) for loop in ("rloo", "ppo") for half in (False, True)
                     for rank in (0, 16)]
    lines = capsys.readouterr().out.splitlines()
    assert lines[4].split() == ["rloo", "bfloat16", "16", "4.00", "30", "25.0%", "4.0", "1.0e-06"] and len(lines) == 9


def test_the_limit_is_the_fastest_of_several_products(monkeypatch):
    """Bug: the slowest, a multiplication without its addition."""
    times, products = iter([0.0, 3.0, 4.0, 6.0, 7.0, 12.0]), []
    monkeypatch.setattr(worker, "clock", lambda device: next(times))
    monkeypatch.setattr(worker.torch, "mm", lambda a, b, out: products.append(a.shape))
    assert worker.product_rate("cpu", 3) == 2 * 2048 ** 3 / 2 and products == [(2048, 2048)] * 3


def test_a_peer_answers_once_a_step_and_says_what_it_cannot_do():
    """
    Bug: lines that get out of step: a library's output between the answers, or an error mistaken for a step; the wait
    for the next order is timed.

    The process has a torch without content, so it starts at once, and a clock that counts how often it is asked.
    """
    script = (
        "import itertools, sys; from types import SimpleNamespace as Module\n"
        "cuda = Module(synchronize=int, reset_peak_memory_stats=int, max_memory_allocated=lambda: 7)\n"
        "sys.modules['torch'] = Module(set_num_threads=int, manual_seed=int, cuda=cuda)\n"
        "sys.path.insert(0, sys.argv[1]); import peers\n"
        "peers.time = Module(perf_counter=itertools.count().__next__)\n"
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
    tokenizer = peers.make_tokenizer(dict(sizes=dict(vocab_size=9), end=7, pad=8))
    assert tokenizer(peers.to_text([3, 0, 7]))["input_ids"] == [3, 0, 7]
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
