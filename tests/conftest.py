"""One tiny run through all stages, made once and shared by the tests of all files, and what was seen while it ran."""

import copy
import inspect
import json
import os
import pickle
import random
import shutil
import signal
from types import SimpleNamespace

import pytest
import torch
from filelock import FileLock

import minirlhf
import world
from model import GPT, GPTConfig, generate
from pipeline import config, episode, run, stages
from pipeline.run import Run
from tokenizer import make_tokenizer

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts jobs in the background without it
torch.set_num_threads(1)  # tensors this small are slower on several threads, and their number changes the rounding
os.environ["OMP_NUM_THREADS"] = "1"  # the same for the processes that tests start

# Small enough for seconds, large enough that every stage learns something and that some responses end before the cap.
# The report's settings are not at their defaults: a number that is computed with a default is noticed.
TINY = dict(policies="dpo,ppo,grpo,ppo_no_kl", n_layer=1, n_head=2, n_embd=32, block_size=40, response_tokens=20,
            temperature=0.9, documents=600, pretrain_steps=55, pretrain_lr=1e-2, pretrain_batch=24, demonstrations=500,
            sft_steps=40, sft_lr=5e-3, sft_batch=28, pairs=300, label_temperature=0.4, flip=0.03, reward_lr=3e-3,
            reward_epochs=3, weight_decay=0.05, beta=0.15, gamma=0.98, lam=0.9, ppo_iterations=6, ppo_batch=48,
            minibatch=24, ppo_lr=3e-3, group=8, grpo_lr=2e-3, dpo_beta=0.4, dpo_lr=2e-3, dpo_epochs=3,
            label_smoothing=0.02, eval_prompts=24, best_of=4, kind="rloo", dpo_kind="ipo")  # which a policy overrides
# The smallest run that works, for tests that need many of them
SMALLEST = dict(TINY, policies="dpo,ppo", block_size=24, response_tokens=8, documents=200, pretrain_steps=20,
                demonstrations=100, sft_steps=12, pairs=40, reward_epochs=2, dpo_epochs=2, ppo_iterations=3,
                ppo_batch=8, minibatch=8, eval_prompts=4, best_of=2)
SEED = 3
COMMAND = ["--quick", "--seed", str(SEED), "--out"]
LOOPS = ("train_sft", "train_reward_model", "train_ppo", "train_grpo", "train_dpo")


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", help="cpu or cuda: where the runs of the tests are made")


def pytest_configure(config):
    if config.getoption("--device") == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # or a run would take a GPU that is there


def pytest_runtest_setup(item):
    """Every test starts with the same random numbers: in any order, in any process."""
    torch.manual_seed(0)
    random.seed(0)


def pytest_collection_modifyitems(items):
    """One test that makes the tiny run comes first, and those that read it come last: no process has to wait."""
    items.sort(key=lambda item: 0 if item.name == "test_a_run_learns" else 2 if "tiny" in item.fixturenames else 1)


@pytest.fixture(scope="session")
def device(request):
    return request.config.getoption("--device")


@pytest.fixture
def exact(device):
    """For a test that compares bytes: a GPU adds up in any order."""
    if device != "cpu":
        pytest.skip("the same bytes are promised on one CPU thread")


@pytest.fixture(scope="session")
def shared(tmp_path_factory):
    """
    shared(name, make) -> a folder that make(folder) has filled, once in a session: one worker makes it, and the others
    wait. (The groups of --dist loadgroup have no effect in some versions of pytest.)
    """
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent  # the folder of all workers of this session

    def get(name, make):
        folder, done = base / name, base / f"{name}.done"
        with FileLock(base / f"{name}.lock"):
            if not done.exists():
                make(folder)
                done.touch()
        return folder

    return get


def make_run(folder, settings=SMALLEST):
    """A finished run with these settings."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(config, "QUICK", settings)
        assert minirlhf.main([*COMMAND, str(folder)]) == 0


# ---- the tiny run ----------------------------------------------------------------------------------------------------

def keep(x):
    """An argument as it is before a loop changes it: of a network, its weights and whether they can be trained."""
    if isinstance(x, torch.nn.Module):
        weights = {name: tensor.clone() for name, tensor in x.state_dict().items()}
        return SimpleNamespace(weights=weights, trainable={w.requires_grad for w in x.parameters()})
    return copy.deepcopy(x)


def record(patch):
    """
    Within the patch, note by stage what a run does: what it gives to its loop, the seed of torch, the files that it
    reads, the settings that it reads; and all that it samples. Returns what fills up.
    """
    seen = SimpleNamespace(loops={}, seeds={}, reads={}, settings={}, samples=[])
    now = [None]  # the stage that runs

    def in_stage(function):
        def call(run, name, seed):
            for cached in ("tokenizer", "texts", "prompts", "pairs"):  # each stage reads what it needs by itself
                vars(run).pop(cached, None)
            seen.reads[name], seen.settings[name], seen.seeds[name] = set(), set(), torch.initial_seed()
            now.append(name)
            text = function(run, name, seed)
            now.pop()
            return text
        return call

    def unnoticed(function):
        def call(*arguments):
            now.append(None)
            result = function(*arguments)
            now.pop()
            return result
        return call

    def recorded(function):
        signature = inspect.signature(function)

        def call(*arguments, **named):
            bound = signature.bind(*arguments, **named).arguments
            seen.loops[now[-1]] = SimpleNamespace(**{name: keep(x) for name, x in bound.items()})
            return function(*arguments, **named)
        return call

    def sampled(policy, prompts, max_new_tokens, temperature, seed):
        sample = SimpleNamespace(stage=now[-1], policy=keep(policy), prompts=prompts, tokens=max_new_tokens,
                                 temperature=temperature, seed=seed, responses=[])
        seen.samples.append(sample)
        for rollout in sample_policy(policy, prompts, max_new_tokens, temperature, seed):
            sample.responses += rollout.response_ids()
            yield rollout

    def reading(function, ending):
        def call(run, name, *rest):
            seen.reads.get(now[-1], set()).add(name + ending)
            return function(run, name, *rest)
        return call

    def getattribute(settings, name):
        if now[-1]:
            seen.settings[now[-1]].add(name)
        return object.__getattribute__(settings, name)

    sample_policy = run.sample_policy
    for name in [name for name in vars(stages) if name.startswith("run_")]:
        patch.setattr(stages, name, in_stage(getattr(stages, name)))
    for name in LOOPS:
        patch.setattr(stages, name, recorded(getattr(stages, name)))
    patch.setattr(run, "sample_policy", sampled)
    for module in (stages, episode):
        patch.setattr(module, "policy_config", unnoticed(module.policy_config))  # a copy of all settings
    patch.setattr(Run, "read", reading(Run.read, ""))
    patch.setattr(Run, "load_network", reading(Run.load_network, ".pt"))
    patch.setattr(config.Config, "__getattribute__", getattribute)
    return seen


def make_tiny(folder):
    folder.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        seen = record(patch)
        make_run(folder / "tiny", TINY)
    (folder / "seen.pickle").write_bytes(pickle.dumps(seen))


@pytest.fixture(scope="session")
def tiny(shared, device):
    """The folder of the tiny run, for reading only: a test that changes files works on the smallest run."""
    return shared("made", make_tiny) / "tiny"


@pytest.fixture(scope="session")
def seen(tiny):
    """What `record` noted while the tiny run was made."""
    return pickle.loads((tiny.parent / "seen.pickle").read_bytes())


@pytest.fixture
def smallest(shared, tmp_path, monkeypatch):
    """A copy of the smallest run. Within the test, --quick means it."""
    monkeypatch.setattr(config, "QUICK", SMALLEST)
    return shutil.copytree(shared("smallest", make_run), tmp_path / "smallest")


def stop_in(monkeypatch, stops):
    """Within the test, Ctrl-C comes after a stage has logged a step, and every step is saved. stops: [(stage, step)]"""
    log, left = Run.log, list(stops)

    def logging(run, stage, row):
        log(run, stage, row)
        if left and left[0] == (stage, row.get("step")):
            left.pop(0)
            raise KeyboardInterrupt

    monkeypatch.setattr(Run, "log", logging)
    monkeypatch.setattr(run, "SAVES", 0.0)
    return left


class Files:
    """
    What a finished run left, and the quantities of one prompt and one response. They are computed without the code of
    the stages: one row at a time, without padding.
    """

    def __init__(self, folder, device):
        self.folder, self.device = folder, device
        self.config = json.loads((folder / "config.json").read_text())
        self.report = json.loads((folder / "report.json").read_text())
        self.scale = json.loads((folder / "gold.json").read_text())
        self.tokenizer = make_tokenizer(json.loads((folder / "tokenizer.json").read_text()))
        self.end = self.tokenizer.n_vocab - 2
        self.policies = self.config["policies"].split(",")
        self.networks = {path.stem: self.network(path) for path in folder.glob("*.pt")}

    def network(self, path):
        """(GPT, the weights that are not the GPT's)."""
        saved = torch.load(path, weights_only=True, map_location="cpu")
        trunk = {key.removeprefix("trunk."): tensor for key, tensor in saved["network"].items()}
        rest = {key: trunk.pop(key) for key in ("score.weight", "score.bias", "mean", "std") if key in trunk}
        network = GPT(GPTConfig(**saved["config"]))
        network.load_state_dict(trunk)
        return network, rest

    def weights(self, name):
        return torch.load(self.folder / f"{name}.pt", weights_only=True, map_location="cpu")["network"]

    def rows(self, name):
        return [json.loads(line) for line in (self.folder / name).read_text().splitlines()]

    def metrics(self, stage):
        """The rows of a stage's steps."""
        return [row for row in self.rows("metrics.jsonl") if row["stage"] == stage and "step" in row]

    def preferences(self, split):
        return [row for row in self.rows("preferences.jsonl") if row["split"] == split]

    def text(self, ids):
        return self.tokenizer.decode([token for token in ids if token != self.end])

    @torch.no_grad()
    def logprobs(self, name, prompt, response):
        """For each response token the log-probs of all tokens at its place, (len(response), V)."""
        logits = self.networks[name][0](torch.tensor([prompt + response]))[0]
        return torch.log_softmax(logits / self.config["temperature"], dim=-1)[len(prompt) - 1:-1]

    @torch.no_grad()
    def scores(self, name, ids):
        """The normalised score after each token, (len(ids),)."""
        network, head = self.networks[name]
        hidden = network.hidden(torch.tensor([ids]))[0]
        raw = hidden @ head["score.weight"][0] + head["score.bias"]
        return ((raw - head["mean"]) / head["std"]).tolist()

    def gold(self, prompt, response):
        return (world.gold(self.text(prompt), self.text(response)) - self.scale["mean"]) / self.scale["std"]

    def kl(self, name, prompt, response):
        """The exact KL from the SFT policy along a response, in nats."""
        policy = self.logprobs(name, prompt, response)
        reference = self.logprobs("sft", prompt, response)
        return sum(float((p.exp() * (p - r)).sum()) for p, r in zip(policy, reference))

    def sample(self, name, prompts, seed):
        """A response to each prompt: at most 256, which the program samples in one batch too."""
        assert len(prompts) <= 256
        generator = torch.Generator(self.device).manual_seed(seed)
        network = copy.deepcopy(self.networks[name][0]).to(self.device)
        tokens, temperature = self.config["response_tokens"], self.config["temperature"]
        return generate(network, prompts, tokens, temperature, generator).response_ids()

    def prompts(self):
        """(training, held-out) prompts as token ids."""
        sides = world.make_prompts(self.config["seed"], 4000, 512)
        return [[self.tokenizer.encode_ordinary(text) for text in side] for side in sides]

    def heldout(self):
        """The prompts of the report."""
        return self.prompts()[1][:self.config["eval_prompts"]]


@pytest.fixture(scope="session")
def files(tiny, device):
    return Files(tiny, device)
