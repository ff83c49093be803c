"""One tiny run through all stages, made once and shared by the tests of all files."""

import hashlib
import json
import os
import random
import shutil
from pathlib import Path

import pytest
import torch
from filelock import FileLock  # torch needs it too

import minirlhf
import world
from tokenizer import frequent_pieces, make_tokenizer
from model import GPT, GPTConfig, generate
from pipeline import config
from pipeline.run import Run

torch.set_num_threads(1)  # tensors this small are slower on several threads, and their number changes the rounding
os.environ["OMP_NUM_THREADS"] = "1"  # the same for the processes that tests start

# Small enough for seconds, large enough that every stage learns something and that some responses end before the cap.
# What the report is computed with is not at its default: a number that is computed with a default is noticed.
TINY = dict(n_layer=1, n_head=2, n_embd=32, block_size=40, response_tokens=20, temperature=0.9, documents=600,
            pretrain_steps=55, pretrain_lr=1e-2, demonstrations=500, sft_steps=40, sft_lr=5e-3, pairs=300,
            label_temperature=0.4, reward_lr=3e-3, beta=0.15, gamma=0.98, lam=0.9, ppo_iterations=6, ppo_batch=64,
            minibatch=32, ppo_lr=2e-3, dpo_beta=0.4, dpo_lr=2e-3, eval_prompts=24, best_of=4)
SEED = "3"


def pytest_runtest_setup(item):
    """Every test starts with the same random numbers: in any order, in any process."""
    torch.manual_seed(0)
    random.seed(0)


def pytest_collection_modifyitems(items):
    """One test that makes the shared runs comes first, and those that read them come last: no process has to wait."""
    def place(item):
        if item.name == "test_the_handover_is_the_tiny_run":
            return 0
        return 2 if "tiny" in item.fixturenames else 1

    items.sort(key=place)


def digest(folder):
    """One hash of the names and bytes of all files in a folder."""
    total = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        total.update(path.name.encode() + path.read_bytes())
    return total.hexdigest()


@pytest.fixture(scope="session")
def shared(tmp_path_factory):
    """
    shared(name, make) -> a folder that make(folder) has filled, once in a session.

    Under xdist one worker makes it, and the others wait for it. (The groups of --dist loadgroup are no substitute: they
    have no effect in some versions of pytest.)
    """
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent  # the folder of all workers of this session

    def get(name, make):
        folder, done = base / name, base / f"{name}.done"
        with FileLock(base / f"{name}.lock"):
            if not done.exists():
                folder.mkdir()
                make(folder)
                done.touch()
        return folder

    return get


def make_tiny(folder, last="report"):
    """
    Make the tiny run. For a planted bug, mutants.py names a finished one without the bug in TINY_RUN, and the stages
    that the bug may change in TINY_STAGES: those up to the stage `last` run again.
    """
    stages = os.environ.get("TINY_STAGES", ",".join(config.STAGES)).split(",")
    stages = [stage for stage in stages if stage in up_to(last)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(config, "QUICK", TINY)
        if "pretrain" in stages:
            begin = ["--quick", "--seed", SEED, "--stages", ",".join(stages)]  # GRPO too
            assert minirlhf.main([*begin, "--out", str(folder)]) == 0
            if last != "report":
                add_later_stages(folder)
            return
        shutil.copytree(os.environ["TINY_RUN"], folder, dirs_exist_ok=True)
        report = "report" in stages
        if report:
            stages.remove("report")  # it shows the rows of all stages in their order
        if stages:
            assert minirlhf.main(["--stages", ",".join(stages), "--out", str(folder)]) == 0
            put_in_order(folder)
        if report:
            assert minirlhf.main(["--stages", "report", "--out", str(folder)]) == 0


def up_to(last):
    return config.STAGES[:config.STAGES.index(last) + 1]


def last_stage(session):
    """The last stage whose files the tests of this session read. For a planted bug there is one test, with a mark."""
    mark = session.items[0].get_closest_marker("until")
    if "TINY_RUN" in os.environ and mark:
        return mark.args[0]
    return "report"


def add_later_stages(folder):
    """Put the files and rows of the stages that did not run beside the others, from the run without the bug."""
    whole = Path(os.environ["TINY_RUN"])
    ended = json.loads((folder / "stages.json").read_text())
    for name in ("metrics.jsonl", "watch.jsonl"):
        rows = (whole / name).read_text().splitlines(keepends=True)
        rows = [row for row in rows if json.loads(row)["stage"] not in ended]
        with open(folder / name, "a") as file:
            file.writelines(rows)
    (folder / "stages.json").write_text(json.dumps({**json.loads((whole / "stages.json").read_text()), **ended}))
    for path in whole.iterdir():
        if not (folder / path.name).exists():
            shutil.copy2(path, folder)


def put_in_order(folder):
    """Put what a run has written down about its stages in their order, as if those that ran last had not run again."""
    for name in ("metrics.jsonl", "watch.jsonl"):
        lines = (folder / name).read_text().splitlines(keepends=True)
        lines.sort(key=lambda line: config.STAGES.index(json.loads(line)["stage"]))
        (folder / name).write_text("".join(lines))
    ended = json.loads((folder / "stages.json").read_text())
    (folder / "stages.json").write_text(json.dumps({stage: ended[stage] for stage in config.STAGES}))


@pytest.fixture(scope="session")
def tiny(request, shared):
    """The folder of the tiny run, for reading only: a test that changes files works on a copy."""
    folder = shared("tiny", lambda folder: make_tiny(folder, last_stage(request.session)))
    before = digest(folder)
    yield folder
    assert digest(folder) == before, "a test has changed the shared run: let it work on tiny_copy"


@pytest.fixture
def begun(tmp_path):
    """The folder of a run with the settings of the tiny run, whose texts are split and encoded: no network, no pair."""
    run = Run(config.Config(**TINY, seed=int(SEED), out=str(tmp_path / "begun")))
    rng = random.Random(0)
    run.write("tokenizer.json", json.dumps(frequent_pieces([world.make_document(rng) for _ in range(100)], 300)))
    run.make_split()
    run.write("tokens.pt", run.encode())
    run.write("config.json", json.dumps({k: v for k, v in vars(run.config).items() if k not in config.COMMAND}))
    return run.folder


@pytest.fixture
def tiny_copy(tiny, tmp_path):
    """A copy of the tiny run, for a test that changes files."""
    return shutil.copytree(tiny, tmp_path / "copy")


@pytest.fixture
def tiny_quick(monkeypatch):
    """Within the test, --quick on the command line means the tiny run."""
    monkeypatch.setattr(config, "QUICK", TINY)


class Files:
    """
    What a finished run left, and the quantities of one prompt and one response. They are computed without the code of
    the stages: one row at a time, without padding.
    """

    def __init__(self, folder):
        self.folder = folder
        self.config = json.loads((folder / "config.json").read_text())
        self.report = json.loads((folder / "report.json").read_text())
        self.scale = json.loads((folder / "gold.json").read_text())
        self.tokenizer = make_tokenizer(json.loads((folder / "tokenizer.json").read_text()))
        self.end = self.tokenizer.n_vocab - 2
        names = ("pretrained", "sft", "dpo", "ppo", "grpo", "reward", "critic")
        self.networks = {name: self.network(name) for name in names}

    def network(self, name):
        """(GPT, the weights that are not the GPT's)."""
        saved = torch.load(self.folder / f"{name}.pt", weights_only=True)
        trunk = {key.removeprefix("trunk."): tensor for key, tensor in saved["network"].items()}
        rest = {key: trunk.pop(key) for key in ("score.weight", "score.bias", "mean", "std") if key in trunk}
        network = GPT(GPTConfig(**saved["config"]))
        network.load_state_dict(trunk)
        return network, rest

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
        """A response to each prompt, 256 at a time."""
        generator = torch.Generator().manual_seed(seed)
        network = self.networks[name][0]
        tokens, temperature = self.config["response_tokens"], self.config["temperature"]
        responses = []
        for at in range(0, len(prompts), 256):
            rollout = generate(network, prompts[at:at + 256], tokens, temperature, generator)
            for row, length in zip(rollout.ids[:, rollout.P:].tolist(), rollout.response_lens.tolist()):
                responses.append(row[:length])
        return responses

    def prompts(self):
        """(training, held-out) prompts as token ids."""
        sides = world.make_prompts(self.config["seed"], 4000, 512)
        return [[self.tokenizer.encode_ordinary(text) for text in side] for side in sides]

    def heldout(self):
        """The prompts of the report."""
        return self.prompts()[1][:self.config["eval_prompts"]]

    def preferences(self, split):
        lines = (self.folder / "preferences.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        return [row for row in rows if row["split"] == split]


@pytest.fixture(scope="session")
def files(tiny):
    return Files(tiny)
