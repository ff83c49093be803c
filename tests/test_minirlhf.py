"""
The pipeline: what each stage is given and what it leaves, resuming, outdated stages, canaries, exit statuses, own data.

The run `handover` goes through all stages with the four training loops replaced. Such a loop records what it was given
and then puts the tiny run's trained weights into the network. So the run takes seconds, and every stage finds what it
would find if the loops had run.
"""

import contextlib
import copy
import gzip
import io
import json
import math
import os
import pickle
import random
import re
import statistics
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import last_stage, up_to
from helpers import PAIRS, surprise, tiny_gpt

import minirlhf
import ppo
import world
from checks import CanaryError
from data import UserError
from minirlhf import USED_BY, outdated_stages
from pipeline import config, stages
from pipeline import report as report_module
from pipeline import run as run_module
from pipeline.config import STAGES, Config, parse_config
from pipeline.folder import MADE_BY
from pipeline.progress import Stopped
from pipeline.run import Run
from pipeline.stages import preference_probability

ROOT = Path(__file__).parent.parent
LOOPS = ("train_sft", "train_reward_model", "train_ppo", "train_grpo", "train_dpo")


def weights_of(folder, name):
    return torch.load(folder / f"{name}.pt", weights_only=True)["network"]


def same_weights(a, b):
    return set(a) == set(b) and all(torch.equal(a[name], b[name]) for name in a)


def metrics_of(folder, stage):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["stage"] == stage]


def without_seconds(folder):
    report = json.loads((folder / "report.json").read_text())
    assert report.pop("seconds")
    return report


# ---- the tiny run as a whole ---------------------------------------------------------------------------------------

def test_a_run_leaves_the_files_of_the_design(tiny):
    """A file of the contract is missing or empty, or a part file stays."""
    files = {path.name for path in tiny.iterdir()}
    assert files == {"config.json", "tokenizer.json", "gold.json", "preferences.jsonl", "metrics.jsonl", "reward.json",
                     "report.json", "report.md", "report.html", "watch.jsonl", "samples.txt", "split.jsonl",
                     "stages.json", ".lock", "tokens.pt", "pretrained.pt",
                     "sft.pt", "reward.pt", "ppo.pt", "critic.pt", "grpo.pt", "dpo.pt"}
    assert all(path.stat().st_size > 0 for path in tiny.iterdir() if path.name != ".lock")


def test_a_run_learns(files):
    """Nothing is learned: a loop changes nothing, moves the policy away from the reward, or its start is saved."""
    rows = files.report["policies"]
    assert files.report["reward_model"]["accuracy"] > 0.55
    assert rows["ppo"]["score"] > rows["sft"]["score"] + 0.3
    assert rows["ppo"]["objective"] > rows["sft"]["objective"] + 0.2
    assert rows["dpo"]["score"] > rows["sft"]["score"] + 0.1
    assert rows["best_of_n"]["score"] > rows["sft"]["score"] + 0.5
    for start, name in (("pretrained", "sft"), ("sft", "ppo"), ("sft", "grpo"), ("sft", "dpo"), ("reward", "critic")):
        assert not same_weights(weights_of(files.folder, start), weights_of(files.folder, name))
    for stage in ("pretrain", "sft", "reward", "dpo"):
        losses = [row["loss"] for row in metrics_of(files.folder, stage) if "loss" in row]
        few = len(losses) // 4
        assert statistics.mean(losses[-few:]) < statistics.mean(losses[:few]) - 0.01


def test_metrics_have_a_row_for_each_step(files):
    """A setting that counts steps, epochs or iterations goes nowhere; or a stage that ended does not say so."""
    settings, pairs = files.config, len(files.preferences("train"))
    expected = dict(pretrain=settings["pretrain_steps"], sft=settings["sft_steps"], preferences=0,
                    reward=settings["reward_epochs"] * math.ceil(pairs / settings["batch_size"]),
                    ppo=settings["ppo_iterations"], grpo=settings["ppo_iterations"], report=0,
                    dpo=settings["dpo_epochs"] * math.ceil(pairs / settings["batch_size"]))
    for stage in STAGES:
        *rows, last = metrics_of(files.folder, stage)
        assert [row["step"] for row in rows] == list(range(expected[stage]))
        assert set(last) == {"stage", "stage_seconds"}


def test_the_first_update_is_on_policy(tiny):
    """KL at the start is not 0, or the ratio on the first minibatch is not 1, or the first loss of DPO is not log 2."""
    first = metrics_of(tiny, "ppo")[0]
    assert first["kl_at_start"] == 0 and first["ratio_error"] < 1e-5
    first = metrics_of(tiny, "dpo")[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-3) and first["margin"] == pytest.approx(0, abs=1e-4)


# ---- the same run again --------------------------------------------------------------------------------------------

@pytest.mark.slow
def test_a_stage_run_again_gives_the_same(tiny, tiny_copy):
    """A stage depends on what ran before it in the same process, or on options that were not saved."""
    for name in ("reward.pt", "reward.json", "ppo.pt", "critic.pt", "dpo.pt", "report.json"):
        (tiny_copy / name).unlink()
    assert minirlhf.main(["--stages", "reward,ppo", "--out", str(tiny_copy)]) == 0
    assert minirlhf.main(["--stages", "dpo,report", "--out", str(tiny_copy)]) == 0
    for name in ("reward", "ppo", "critic", "dpo"):
        assert same_weights(weights_of(tiny_copy, name), weights_of(tiny, name)), name
    assert without_seconds(tiny_copy) == without_seconds(tiny)
    assert (tiny_copy / "samples.txt").read_text() == (tiny / "samples.txt").read_text()
    for stage in STAGES:  # its rows once, not beside those of the first time
        assert len(metrics_of(tiny_copy, stage)) == len(metrics_of(tiny, stage))


AGAIN = """
import json, sys, torch
import minirlhf
from pipeline import config
torch.set_num_threads(1)  # as here: the number of threads changes how sums are rounded
config.QUICK = json.loads(sys.argv[1])
for flags in (["--quick", "--seed", sys.argv[2], "--stages", "pretrain,sft,preferences"],
              ["--stages", "reward,ppo,grpo"], ["--stages", "dpo"], ["--stages", "report"]):
    assert minirlhf.main([*flags, "--out", sys.argv[3]]) == 0
"""


@pytest.mark.slow
def test_the_same_run_by_four_commands_in_another_process(files, tiny, tmp_path):
    """Hidden randomness: a set's order, the clock, or a generator that was not seeded decides a number."""
    again = tmp_path / "tiny"
    settings = {name: value for name, value in files.config.items() if name not in ("seed", "quick")}
    command = [sys.executable, "-c", AGAIN, json.dumps(settings), str(files.config["seed"]), str(again)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, env={**os.environ, "PYTHONHASHSEED": "77"})
    for name in ("tokenizer.json", "gold.json", "preferences.jsonl", "reward.json", "samples.txt"):
        assert (again / name).read_bytes() == (tiny / name).read_bytes(), name
    for name in ("pretrained", "sft", "reward", "ppo", "critic", "grpo", "dpo"):
        assert same_weights(weights_of(again, name), weights_of(tiny, name)), name
    assert without_seconds(again) == without_seconds(tiny)


def test_another_seed_gives_another_run(tiny_quick, tmp_path, monkeypatch):
    """The seed is ignored: by the texts, by the first weights, or by the steps."""
    starts, seeds = [], []

    def train_sft(network, examples, steps, peak_lr, config, pad, seed, name, log, progress):
        starts.append(network.wpe.weight.clone())
        seeds.append((seed, torch.initial_seed()))  # that of the steps, and that of the first weights
        return 0.0

    monkeypatch.setattr(stages, "train_sft", train_sft)
    for seed in ("4", "5", "4"):  # an unfinished run is begun anew
        assert minirlhf.main(["--quick", "--seed", seed, "--stages", "pretrain", "--out", str(tmp_path / seed)]) == 0
    assert torch.equal(starts[0], starts[2]) and not torch.equal(starts[0], starts[1])
    assert seeds[0] == seeds[2]
    assert seeds[0][0] != seeds[1][0] and seeds[0][1] != seeds[1][1]
    assert (tmp_path / "4" / "tokenizer.json").read_bytes() != (tmp_path / "5" / "tokenizer.json").read_bytes()


# ---- what the stages hand over -------------------------------------------------------------------------------------

def snapshot(network):
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


def is_trainable(network):
    return all(parameter.requires_grad for parameter in network.parameters())


def is_frozen(network):
    return not any(parameter.requires_grad for parameter in network.parameters())


@pytest.fixture(scope="module")
def handover(tiny, shared, request):
    """What was seen in a run of all stages with recording loops: loops, samples, reads, writes, out, folder, config."""
    folder = shared("handover", lambda folder: make_handover(tiny, folder, last_stage(request.session)))
    return pickle.loads((folder / "seen.pickle").read_bytes())


def make_handover(tiny, folder, last):
    settings = parse_config(["--stages", "report", "--out", str(tiny)])
    settings.stages, settings.out = ",".join(up_to(last)), str(folder)
    seen = SimpleNamespace(loops={}, samples=[], reads={}, writes={}, folder=folder, config=settings)
    stage = []

    def load(network, name):
        network.load_state_dict(weights_of(tiny, name))

    def train_sft(network, examples, steps, peak_lr, config, pad, seed, name, log, progress):
        seen.loops[stage[-1]] = SimpleNamespace(
            start=snapshot(network), trainable=is_trainable(network), examples=examples, steps=steps, peak_lr=peak_lr,
            config=config, pad=pad, seed=seed)
        load(network, dict(pretrain="pretrained", sft="sft")[stage[-1]])
        return 1.25

    def train_reward_model(reward_model, pairs, pad, config, seed, log, progress):
        seen.loops["reward"] = SimpleNamespace(start=snapshot(reward_model), trainable=is_trainable(reward_model),
                                               pairs=pairs, pad=pad, config=config, seed=seed)
        load(reward_model, "reward")

    def train_ppo(policy, critic, reference, reward_model, prompts, config, seed, log, gold_fn, progress, watch):
        rollout = SimpleNamespace(response_ids=lambda: [prompts[1], prompts[0]])
        seen.loops["ppo"] = SimpleNamespace(
            start=snapshot(policy), critic=snapshot(critic), reference=snapshot(reference),
            reward_model=snapshot(reward_model), prompts=prompts, config=config, seed=seed,
            trainable=is_trainable(policy) and is_trainable(critic),
            frozen=is_frozen(reference) and is_frozen(reward_model), gold=gold_fn(prompts[:2], rollout).tolist())
        load(policy, "ppo")
        load(critic, "critic")
        log(step=0, score=1.0, gold=2.0, kl=3.0, length=4.0)

    def train_grpo(policy, reference, reward_model, prompts, config, seed, log, gold_fn, progress, watch):
        rollout = SimpleNamespace(response_ids=lambda: [prompts[1], prompts[0]])
        seen.loops["grpo"] = SimpleNamespace(
            start=snapshot(policy), reference=snapshot(reference), reward_model=snapshot(reward_model),
            prompts=prompts, config=config, seed=seed, trainable=is_trainable(policy),
            frozen=is_frozen(reference) and is_frozen(reward_model), gold=gold_fn(prompts[:2], rollout).tolist())
        load(policy, "grpo")
        log(step=0, score=1.0, gold=2.0, kl=3.0, length=4.0)

    def train_dpo(policy, reference, pairs, pad, config, seed, log, progress):
        seen.loops["dpo"] = SimpleNamespace(
            start=snapshot(policy), reference=snapshot(reference), pairs=pairs, pad=pad, config=config, seed=seed,
            trainable=is_trainable(policy), frozen=is_frozen(reference))
        load(policy, "dpo")
        log(step=0, loss=1.0, margin=2.0, chosen_logp=3.0, rejected_logp=4.0)

    def sample_policy(policy, prompts, max_new_tokens, temperature, seed, name, size=256):
        rollouts = sample(policy, prompts, max_new_tokens, temperature, seed, name, size)
        responses = [response for rollout in rollouts for response in rollout.response_ids()]
        seen.samples.append(SimpleNamespace(
            stage=stage[-1], policy=snapshot(policy), prompts=prompts, seed=seed, responses=responses,
            settings=(max_new_tokens, temperature)))
        return rollouts

    def begin_metrics(self, name):
        stage.append(name)
        seen.reads[name], seen.writes[name] = set(), set()
        return begin(self, name)

    def path(self, name):
        seen.reads[stage[-1]].add(name)
        return find(self, name)

    def write(self, name, content):
        if stage and name in MADE_BY:
            seen.writes[stage[-1]].add(name)
        put(self, name, content)

    sample, begin, find, put = stages.sample_policy, Run.begin_metrics, Run.path, Run.write
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as out:
        for module in (stages, report_module):
            patch.setattr(module, "sample_policy", sample_policy)
        for loop in (train_sft, train_reward_model, train_ppo, train_grpo, train_dpo):
            patch.setattr(stages, loop.__name__, loop)
        for function in (begin_metrics, path, write):
            patch.setattr(Run, function.__name__, function)
        minirlhf.run_stages(Run(settings))
    seen.out = out.getvalue()
    (folder / "seen.pickle").write_bytes(pickle.dumps(seen))


def test_the_handover_is_the_tiny_run(handover, tiny):
    """The tests below look at another run than the one that users get."""
    for name in ("tokenizer.json", "gold.json", "preferences.jsonl", "reward.json", "samples.txt"):
        assert (handover.folder / name).read_bytes() == (tiny / name).read_bytes()
    assert without_seconds(handover.folder) == without_seconds(tiny)


@pytest.mark.until("pretrain")
def test_pretraining_starts_fresh_and_reads_documents(handover, files, tiny):
    """Pretraining continues an old network, reads the demonstrations, or never sees the end of a text."""
    loop, settings = handover.loops["pretrain"], files.config
    assert loop.trainable and not same_weights(loop.start, weights_of(tiny, "pretrained"))
    assert loop.start["wte.weight"].std().item() == pytest.approx(0.02, rel=0.1)
    assert (loop.steps, loop.peak_lr, loop.pad) == (settings["pretrain_steps"], settings["pretrain_lr"], files.end + 1)
    sizes = torch.load(tiny / "pretrained.pt", weights_only=True)["config"]
    assert sizes.pop("vocab_size") == files.tokenizer.n_vocab
    assert sizes == {name: settings[name] for name in ("block_size", "n_layer", "n_head", "n_embd")}
    rng = random.Random(settings["seed"])
    texts = [world.make_document(rng) for _ in range(settings["documents"])]
    assert len(loop.examples) == len(texts)
    cut = 0
    for (prompt, response), text in zip(loop.examples, texts):
        assert prompt == [files.end]
        whole = [*files.tokenizer.encode_ordinary(text), files.end]
        assert response == whole[:settings["block_size"] - 1]
        cut += len(response) < len(whole)
    assert 0 < cut < len(texts)


@pytest.mark.until("pretrain")
def test_the_tokenizer_has_the_frequent_pieces_of_the_documents(handover, files):
    """The tokenizer is made of other texts than those that are trained on."""
    pieces = Counter()
    for _, response in handover.loops["pretrain"].examples:
        pieces.update(files.text(response).split())
    known = json.loads((files.folder / "tokenizer.json").read_text())
    for word, count in pieces.items():
        if count > 20:
            assert word in known or " " + word in known


@pytest.mark.until("sft")
def test_sft_imitates_demonstrations_of_training_prompts(handover, files, tiny):
    """SFT starts from a fresh network, sees prompts of the evaluation, or demonstrations for other prompts."""
    loop, settings = handover.loops["sft"], files.config
    assert loop.trainable and same_weights(loop.start, weights_of(tiny, "pretrained"))
    assert (loop.steps, loop.peak_lr, loop.pad) == (settings["sft_steps"], settings["sft_lr"], files.end + 1)
    train = set(map(tuple, files.prompts()[0]))
    assert len(loop.examples) == settings["demonstrations"]
    cut = 0
    for prompt, response in loop.examples:
        assert tuple(prompt) in train
        text = files.text(response)
        assert text.startswith(" ")
        if response[-1] != files.end:
            assert len(response) == settings["response_tokens"]
            cut += 1
            continue
        assert files.end not in response[:-1] and len(response) <= settings["response_tokens"]
        subject = world.subject_of(files.text(prompt))
        for clause in re.split(r" \.| and | but ", text.strip().removesuffix(" .")):
            aspect, _ = world.parse_clause(clause.strip())
            assert aspect == "verdict" or aspect in world.ASPECTS[subject]
    assert 0 < cut < len(loop.examples) / 2
    assert len({tuple(prompt) for prompt, _ in loop.examples}) > len(loop.examples) / 2


@pytest.mark.until("preferences")
def test_preferences_compare_two_samples_of_the_sft_policy(handover, files, tiny):
    """The pairs are answers of the pretrained network, to prompts of the evaluation, or to two different prompts."""
    sample = next(sample for sample in handover.samples if sample.stage == "preferences")
    settings = files.config
    assert same_weights(sample.policy, weights_of(tiny, "sft"))
    assert sample.settings == (settings["response_tokens"], settings["temperature"])
    train, heldout = [set(map(tuple, side)) for side in files.prompts()]
    prompts = list(map(tuple, sample.prompts))
    assert prompts[::2] == prompts[1::2] and len(prompts) == 2 * (settings["pairs"] + 512)
    assert set(prompts[:2 * settings["pairs"]]) <= train
    assert set(prompts[2 * settings["pairs"]:]) <= heldout
    assert len(set(prompts[:2 * settings["pairs"]])) > 0.9 * settings["pairs"]
    assert len(set(prompts[2 * settings["pairs"]:])) == settings["eval_prompts"]

    expected = []  # which two responses stand in each row, in no order
    for i in range(0, len(prompts), 2):
        if sample.responses[i] != sample.responses[i + 1]:
            split = "train" if i < 2 * settings["pairs"] else "heldout"
            expected.append((split, list(prompts[i]), sorted(sample.responses[i:i + 2])))
    found = [(row["split"], row["prompt"], sorted([row["chosen"], row["rejected"]]))
             for split in ("train", "heldout") for row in files.preferences(split)]
    assert found == expected

    golds = [world.gold(files.text(prompt), files.text(response))
             for prompt, response in zip(sample.prompts, sample.responses)]
    assert files.scale["mean"] == pytest.approx(statistics.mean(golds), abs=1e-5)
    assert files.scale["std"] == pytest.approx(statistics.pstdev(golds), abs=1e-5)


@pytest.mark.until("reward")
def test_the_reward_model_starts_from_sft_and_learns_training_pairs(handover, files, tiny):
    """The reward model is trained on the held-out pairs, or starts from another network than the SFT policy."""
    loop = handover.loops["reward"]
    trunk = {name.removeprefix("trunk."): tensor for name, tensor in loop.start.items() if name.startswith("trunk.")}
    assert loop.trainable and same_weights(trunk, weights_of(tiny, "sft"))
    assert loop.pairs == files.preferences("train") and loop.pad == files.end + 1
    assert loop.config is handover.config


@pytest.mark.until("reward")
def test_scores_are_normalised_on_sft_samples_of_training_prompts(handover, files, tiny):
    """The reward model is normalised on other samples, on held-out prompts, or not at all."""
    sample = next(sample for sample in handover.samples if sample.stage == "reward")
    settings = files.config
    assert same_weights(sample.policy, weights_of(tiny, "sft"))
    assert sample.settings == (settings["response_tokens"], settings["temperature"])
    assert sample.prompts == files.prompts()[0][:1024]
    scores = [files.scores("reward", prompt + response)[-1]
              for prompt, response in zip(sample.prompts, sample.responses)]
    assert statistics.mean(scores) == pytest.approx(0, abs=1e-3)
    assert statistics.pstdev(scores) == pytest.approx(1, abs=1e-3)


@pytest.mark.until("ppo")
def test_ppo_starts_where_it_should(handover, files, tiny):
    """
    The policy starts from the pretrained network, the critic from a fresh head, the reference is not the SFT policy
    or learns along, the prompts are those of the evaluation, or gold is that of other texts.
    """
    loop = handover.loops["ppo"]
    assert same_weights(loop.start, weights_of(tiny, "sft")) and same_weights(loop.reference, weights_of(tiny, "sft"))
    assert same_weights(loop.reward_model, weights_of(tiny, "reward"))
    assert same_weights(loop.critic, weights_of(tiny, "reward"))
    assert loop.trainable and loop.frozen and loop.config is handover.config
    prompts = files.prompts()[0]
    assert loop.prompts == prompts
    golds = [files.gold(prompts[0], prompts[1]), files.gold(prompts[1], prompts[0])]
    assert loop.gold == pytest.approx(golds, abs=1e-5)


@pytest.mark.until("grpo")
def test_grpo_starts_where_it_should(handover, files, tiny):
    """GRPO goes on from PPO's policy, learns along with its reference, asks other prompts, or maximises the critic."""
    loop = handover.loops["grpo"]
    assert same_weights(loop.start, weights_of(tiny, "sft")) and same_weights(loop.reference, weights_of(tiny, "sft"))
    assert same_weights(loop.reward_model, weights_of(tiny, "reward"))
    assert loop.trainable and loop.frozen and loop.config is handover.config
    assert loop.prompts == files.prompts()[0] and loop.gold == handover.loops["ppo"].gold


def test_dpo_starts_where_it_should(handover, files, tiny):
    """DPO starts from the PPO policy, is trained on held-out pairs, or its reference learns along."""
    loop = handover.loops["dpo"]
    assert same_weights(loop.start, weights_of(tiny, "sft")) and same_weights(loop.reference, weights_of(tiny, "sft"))
    assert loop.trainable and loop.frozen and loop.config is handover.config
    assert loop.pairs == files.preferences("train") and loop.pad == files.end + 1


def test_the_report_asks_held_out_prompts_at_the_temperature_of_training(handover, files, tiny):
    """The evaluation asks training prompts, cools the policies down, or gives one of them luckier random numbers."""
    samples = [sample for sample in handover.samples if sample.stage == "report"]
    names = [name for sample in samples for name in ("pretrained", "sft", "dpo", "ppo", "grpo")
             if same_weights(sample.policy, weights_of(tiny, name))]
    assert names == ["sft", "pretrained", "dpo", "ppo", "grpo"]
    heldout = files.heldout()
    assert set(map(tuple, samples[0].prompts)) == set(map(tuple, heldout))
    for sample in samples:
        assert sample.settings == (files.config["response_tokens"], files.config["temperature"])
    for sample in samples[1:]:
        assert sample.prompts == heldout and sample.seed == samples[1].seed


def test_stages_have_random_numbers_of_their_own(handover):
    """Two stages draw the same random numbers: PPO answers as the responses were that it is rewarded by."""
    seeds = {}
    assert handover.loops["grpo"].seed == handover.loops["ppo"].seed  # so that the two rows compare
    for stage, loop in handover.loops.items():
        if stage != "grpo":
            seeds.setdefault(stage, set()).add(loop.seed)
    for sample in handover.samples:
        seeds.setdefault(sample.stage, set()).add(sample.seed)
    everything = [seed for stage in seeds for seed in seeds[stage]]
    assert len(everything) == len(set(everything))
    assert all(seed >= handover.config.seed for seed in everything)


def test_a_file_is_made_by_the_stage_that_the_hint_names(handover):
    """'run --stages X first' names a stage that does not make the file."""
    made = {name: stage for stage, names in handover.writes.items() for name in names}
    assert {**made, "data.json": "pretrain"} == MADE_BY  # that one only with --data


def test_what_a_stage_is_built_on(handover):
    """A stage that reads the result of another one, directly or not, is not outdated by it; or one that does not is."""
    ancestors = {}
    for stage in STAGES:
        parents = {MADE_BY[name] for name in handover.reads[stage]} - {stage}
        ancestors[stage] = parents.union(*[ancestors[parent] for parent in parents])
    for stage in STAGES:
        for other in STAGES:
            assert (stage in USED_BY[other]) == (other in ancestors[stage]), (stage, other)


def test_the_screen_shows_each_stage_and_its_result(handover, files):
    """The line of a stage shows another stage's numbers."""
    out = handover.out
    for number, stage in enumerate(STAGES, start=1):
        assert re.search(rf"^{number}/8  {stage}: [A-Z].*\.$", out, re.MULTILINE)
    parameters = sum(parameter.numel() for parameter in files.networks["pretrained"][0].parameters())
    assert f"     {parameters:,} parameters, 600 texts, loss 1.25 nats a token  [" in out
    assert "     500 demonstrations, loss 1.25 nats a token  [" in out
    rows = files.preferences("train") + files.preferences("heldout")
    wrong = sum(row["gold"][0] < row["gold"][1] for row in rows) / len(rows)
    assert (f"     {len(rows):,} pairs; in {wrong:.0%} of them "
            "the annotator preferred the response with less gold  [") in out
    result = json.loads((files.folder / "reward.json").read_text())
    assert (f"accuracy {result['accuracy']:.3f} ±{result['accuracy_se']:.3f} on "
            f"{len(files.preferences('heldout'))} held-out pairs (at most "
            f"{result['label_ceiling']:.3f} with the labels' noise), {result['gold_accuracy']:.3f} "
            f"±{result['gold_accuracy_se']:.3f} against the order by gold  [") in out
    assert "score 1.00, gold 2.00, kl 3.00, length 4.00  [" in out
    assert "loss 1.00, margin 2.00, chosen logp 3.00, rejected logp 4.00  [" in out
    assert f"seed 3, cpu, torch {torch.__version__}, writing to {handover.folder}" in out
    assert "older than" not in out


# ---- labels and the reward model's numbers -------------------------------------------------------------------------

def sigmoid(x):
    return 1 / (1 + math.exp(-x))


@pytest.mark.until("preferences")
def test_labels_carry_their_gold_and_their_ceiling(files):
    """A pair has the gold of other responses, or its two texts are exchanged; the ceiling forgets T or the flips."""
    for row in files.preferences("train")[::5] + files.preferences("heldout")[::5]:
        golds = [files.gold(row["prompt"], row["chosen"]), files.gold(row["prompt"], row["rejected"])]
        assert row["gold"] == pytest.approx(golds, abs=1e-5)
        assert row["text"] == [files.text(row[name]) for name in ("prompt", "chosen", "rejected")]
        p = sigmoid((golds[0] - golds[1]) / files.config["label_temperature"])
        assert row["ceiling"] == pytest.approx(max(p, 1 - p), abs=1e-5)


def label(begun, monkeypatch, values, equal=0, **settings):
    """
    Label made-up responses whose gold is drawn from `values`; returns the rows of preferences.jsonl.

    The first `equal` pairs have two equal responses.
    """
    run = Run(parse_config(["--stages", "preferences", "--out", str(begun)]))
    run.config = Config(**{**vars(run.config), **settings})
    rng = random.Random(1)
    ids = [[i // 100, i % 100, 7] for i in range(2 * (run.config.pairs + 512))]
    ids[1:2 * equal:2] = ids[:2 * equal:2]
    golds = [rng.choice(values) for _ in ids]
    golds[1:2 * equal:2] = golds[:2 * equal:2]
    monkeypatch.setattr(run, "load_network", lambda name: None)
    monkeypatch.setattr(run, "raw_gold", lambda prompts, responses: torch.tensor(golds))
    monkeypatch.setattr(stages, "sample_policy", lambda *arguments: [SimpleNamespace(response_ids=lambda: ids)])
    stages.run_preferences(run, lambda **row: None)
    mean, std = statistics.mean(golds), statistics.pstdev(golds)
    rows = [json.loads(line) for line in (begun / "preferences.jsonl").read_text().splitlines()]
    for row in rows:
        points = [golds[100 * row[name][0] + row[name][1]] for name in ("chosen", "rejected")]
        assert row["gold"] == pytest.approx([(x - mean) / std for x in points], abs=1e-5)
    return rows


@pytest.mark.parametrize("flip", [0.0, 0.2])
@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_labels_follow_bradley_terry_on_gold(begun, monkeypatch, temperature, flip):
    """The annotator prefers the worse response, or --flip or --label-temperature goes nowhere."""
    rows = label(begun, monkeypatch, [0.0, 1.0, 3.0], label_temperature=temperature, flip=flip, pairs=1500)
    outcomes = {}
    for row in rows:
        difference = round(row["gold"][0] - row["gold"][1], 4)
        outcomes.setdefault(abs(difference), Counter())["better" if difference > 0 else "worse"] += 1
    assert len(outcomes) == 4
    for difference, counts in outcomes.items():
        if difference > 0:
            p = sigmoid(difference / temperature)
            p = (1 - flip) * p + flip * (1 - p)
            assert surprise([counts["better"], counts["worse"]], [p, 1 - p]) < 4
    for row in rows:
        p = sigmoid(abs(row["gold"][0] - row["gold"][1]) / temperature)
        assert row["ceiling"] == pytest.approx((1 - flip) * p + flip * (1 - p), abs=1e-4)


def test_a_pair_of_equal_responses_is_left_out(begun, monkeypatch):
    """Two equal responses teach nothing, and count as a pair."""
    rows = label(begun, monkeypatch, [0.0, 1.0], equal=20, pairs=50)
    assert [row["split"] for row in rows] == 30 * ["train"] + 512 * ["heldout"]
    assert all(row["chosen"] != row["rejected"] for row in rows)


def test_responses_of_equal_gold_are_labelled_by_a_coin(begun, monkeypatch):
    """Between two responses of equal gold the first one always wins."""
    rows = label(begun, monkeypatch, [0.0, 1.0], label_temperature=0.3, pairs=1500)
    firsts = [row["chosen"] < row["rejected"] for row in rows if row["gold"][0] == row["gold"][1]]
    assert surprise([sum(firsts), len(firsts) - sum(firsts)], [0.5, 0.5]) < 4


def test_labels_without_noise(begun, monkeypatch):
    """A temperature of 0 divides by 0, or leaves noise."""
    rows = label(begun, monkeypatch, [0.0, 1.0, 2.0], label_temperature=0.0, pairs=200)
    assert all(row["gold"][0] >= row["gold"][1] for row in rows)


@pytest.mark.parametrize("difference, temperature, flip, p", [
    (0.0, 0.3, 0.0, 0.5), (0.0, 0.0, 0.0, 0.5), (0.1, 0.0, 0.0, 1.0), (-0.1, 0.0, 0.0, 0.0), (-0.1, 0.0, 0.25, 0.25),
    (1.0, 1.0, 0.0, 0.7310586), (-1.0, 1.0, 0.0, 0.2689414), (2.0, 2.0, 0.1, 0.6848469), (1.0, 0.5, 0.5, 0.5),
    (9.0, 1.0, 1.0, 0.0001234), (4.0, 1e-3, 0.0, 1.0), (-4.0, 1e-3, 0.0, 0.0)])
def test_preference_probability_by_hand(difference, temperature, flip, p):
    """A flip of 1 leaves the label as it is, a tie is won by one side, or a small temperature overflows."""
    assert preference_probability(difference, temperature, flip) == pytest.approx(p, abs=1e-6)


@pytest.mark.until("reward")
def test_the_accuracy_of_the_reward_model(files):
    """Accuracy on the training pairs, a tie counted as right, or the ceiling of other pairs."""
    right = gold_right = known = ceiling = 0.0
    heldout = files.preferences("heldout")
    residuals, gold_residuals = {}, {}  # of each prompt: what is right, as lists
    for row in heldout:
        chosen = files.scores("reward", row["prompt"] + row["chosen"])[-1]
        rejected = files.scores("reward", row["prompt"] + row["rejected"])[-1]
        assert abs(chosen - rejected) > 1e-5  # close enough to a tie to be rounded to another side
        right += chosen > rejected
        residuals.setdefault(tuple(row["prompt"]), []).append(float(chosen > rejected))
        ceiling += row["ceiling"]
        gold = row["gold"][0] - row["gold"][1]
        if gold != 0:
            known += 1
            gold_right += (chosen > rejected) == (gold > 0)
            gold_residuals.setdefault(tuple(row["prompt"]), []).append(float((chosen > rejected) == (gold > 0)))
    result = json.loads((files.folder / "reward.json").read_text())
    errors = []
    all_pairs = len(heldout)
    for mean, groups, n in ((right / all_pairs, residuals, all_pairs), (gold_right / known, gold_residuals, known)):
        G = len(groups)
        total = sum(sum(x - mean for x in group) ** 2 for group in groups.values())
        assert 10 < G < n
        errors.append(math.sqrt(G / (G - 1) * total) / n)
    assert result.pop("at_chance") is False
    assert result == pytest.approx(dict(
        accuracy=right / len(heldout), accuracy_se=errors[0], gold_accuracy=gold_right / known,
        gold_accuracy_se=errors[1], label_ceiling=ceiling / len(heldout), pairs=len(files.preferences("train"))))
    assert known < len(heldout) and result["accuracy"] != result["gold_accuracy"]


# ---- SFT -----------------------------------------------------------------------------------------------------------

EXAMPLES = [(pair["prompt"], pair["chosen"]) for pair in PAIRS]


def slow_sft(network, examples, steps, peak_lr, batch_size, seed):
    """`train_sft` written again: one example at a time, without padding."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(network.parameters(), betas=(0.9, 0.95), weight_decay=0.1, fused=False)
    losses = []
    for step in range(steps):
        logp, tokens = 0.0, 0
        for i in torch.randint(len(examples), (batch_size,), generator=generator).tolist():
            prompt, response = examples[i]
            rows = torch.log_softmax(network(torch.tensor([prompt + response]))[0], dim=-1)
            for t, token in enumerate(response):
                logp = logp + rows[len(prompt) - 1 + t, token]
                tokens += 1
        loss = -logp / tokens
        rising, falling = (step + 1) / 20, 1 - step / steps
        for group in optimizer.param_groups:
            group["lr"] = peak_lr * min(rising, falling)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_sft_equals_a_slow_replay():
    """The loss counts prompt tokens or padding, is a mean over rows, or the learning rate does not rise and fall."""
    network = tiny_gpt(seed=1)
    expected = copy.deepcopy(network)
    losses = slow_sft(expected, EXAMPLES, 30, 0.01, 3, seed=5)
    rows = []
    last = stages.train_sft(network, EXAMPLES, 30, 0.01, Config(batch_size=3), 10, 5, "sft",
                              lambda **row: rows.append(row))
    assert [row["step"] for row in rows] == list(range(30))
    assert [row["loss"] for row in rows] == pytest.approx(losses, abs=1e-8)
    assert last == rows[-1]["loss"] and losses[-1] < losses[0] - 0.3
    for name, parameter in network.state_dict().items():
        torch.testing.assert_close(parameter, expected.state_dict()[name], rtol=1e-6, atol=1e-8)


def test_sft_stops_when_the_loss_is_not_finite():
    """A network that diverged is trained to the end and saved."""
    network = tiny_gpt()
    with torch.no_grad():
        network.wte.weight.fill_(math.nan)
    with pytest.raises(CanaryError, match="the sft loss is nan"):
        stages.train_sft(network, EXAMPLES, 3, 0.01, Config(batch_size=3), 10, 5, "sft", lambda **row: None)


@pytest.mark.parametrize("seed", [0, 2])
def test_no_demonstration_is_longer_than_the_block(seed, tmp_path, monkeypatch):
    """A demonstration that does not fit the block ends the run in a traceback, for one seed in three."""
    longest = []

    def train_sft(network, examples, *rest):
        longest.append(max(len(prompt) + len(response) for prompt, response in examples))
        return 1.0

    monkeypatch.setattr(stages, "train_sft", train_sft)
    settings = dict(config.QUICK, documents=1000, demonstrations=4000, response_tokens=24, block_size=40, n_embd=8)
    minirlhf.run_stages(Run(Config(**settings, seed=seed, stages="pretrain,sft", out=str(tmp_path))))
    assert len(longest) == 2 and max(longest) <= 40


# ---- the line of results -------------------------------------------------------------------------------------------

def test_a_result_is_the_mean_of_the_last_ten_rows(tmp_path):
    """The line of a stage shows its first rows, all rows, or those of another stage."""
    run = Run(Config(out=str(tmp_path)))
    for stage in ("dpo", "ppo"):
        log = run.begin_metrics(stage)
        for step in range(14):
            log(step=step, loss=float(step ** 2), chosen_logp=-float(step), other=1.0)
        log(stage_seconds=9.0)
        run.begin_metrics("sft")(step=0, loss=500.0)
    mean = sum(step ** 2 for step in range(4, 14)) / 10
    line = run.last_metrics("dpo", ("loss", "gold", "chosen_logp"))
    assert line == f"loss {mean:.2f}, chosen logp -8.50"


# ---- outdated stages -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("done, outdated", [
    ("pretrain sft preferences reward ppo dpo report", ""),
    ("pretrain sft preferences ppo dpo report reward", "ppo report"),
    ("pretrain sft preferences reward ppo report dpo", "report"),
    ("sft preferences reward ppo dpo report pretrain", "sft preferences reward ppo dpo report"),
    ("pretrain sft reward ppo dpo preferences", "reward ppo dpo"),
    ("pretrain sft preferences reward dpo ppo report", ""),
    ("pretrain preferences sft", "preferences"),
    ("", "")])
def test_outdated_stages_by_hand(done, outdated):
    """A network that was built on an old result is not named, or one that was not built on it is."""
    assert outdated_stages(done.split()) == outdated.split()


@pytest.fixture
def instant(monkeypatch):
    """Within the test, every stage ends at once and leaves nothing. Returns the list of those that ran."""
    ran = []

    def make(stage):
        def function(run, log):
            """Do nothing."""
            ran.append(stage)
            return "done"
        return function

    monkeypatch.setattr(minirlhf, "FUNCTIONS", {stage: make(stage) for stage in STAGES})
    return ran


def test_what_is_outdated_is_said(tmp_path, instant, capsys):
    """A stage is run again, and what was built on its old result is reported as if it were built on the new one."""
    def run(stages):
        assert minirlhf.main(["--stages", stages, "--out", str(tmp_path)]) == 0
        return capsys.readouterr().out.splitlines()[-1]

    assert run(",".join(STAGES)).startswith("     done")
    instant.clear()
    said = "outdated, because what they are built on is newer: go on with --stages "
    assert run("reward") == said + "ppo,grpo,report"
    assert run("dpo") == said + "ppo,grpo,report"
    assert run("ppo") == said + "grpo,report"
    assert run("grpo") == said + "report"
    assert run("report").startswith("     done")
    assert instant == ["reward", "dpo", "ppo", "grpo", "report"]


# ---- canaries and exit statuses ------------------------------------------------------------------------------------

def test_a_canary_stops_the_run_and_keeps_the_checkpoint(tiny_copy, capsys, monkeypatch):
    """A broken invariant is trained on silently, or the stop destroys what was good."""
    before = {name: (tiny_copy / name).read_bytes() for name in ("ppo.pt", "critic.pt", "report.json")}
    exact = ppo.response_logprobs
    monkeypatch.setattr(ppo, "response_logprobs", lambda model, batch, temperature=1.0: exact(model, batch, 0.7))
    assert minirlhf.main(["--stages", "ppo,report", "--out", str(tiny_copy)]) == 1
    error = capsys.readouterr().err
    assert "minirlhf: stopped: the ratio on the first minibatch" in error
    assert error.endswith("The checkpoints of earlier stages are as they were.\n")
    assert {name: (tiny_copy / name).read_bytes() for name in before} == before


@pytest.mark.parametrize("fault, status, message", [
    (UserError("your file is broken"), 2, "minirlhf: your file is broken\n"),
    (PermissionError(13, "Permission denied", "page.html"), 2,
     "minirlhf: page.html cannot be used (Permission denied)\n"),
    (CanaryError("no"), 1, "\nminirlhf: stopped: no. The checkpoints of earlier stages are as they were.\n"),
    (KeyboardInterrupt(), 130, "\nminirlhf: stopped by SIGINT: go on with --resume --out {out}\n"),
    (Stopped(15), 143, "\nminirlhf: stopped by SIGTERM: go on with --resume --out {out}\n")])
def test_exit_statuses(fault, status, message, tmp_path, instant, capsys):
    """A stop ends in a traceback or with status 0, or the stages after it run nevertheless."""
    def function(run, log):
        """Stop."""
        raise fault

    minirlhf.FUNCTIONS["sft"] = function
    assert minirlhf.main(["--out", str(tmp_path)]) == status
    assert capsys.readouterr().err == message.format(out=tmp_path) and instant == ["pretrain"]


def test_other_errors_are_not_hidden(tmp_path, instant):
    """A bug of ours is reported as a mistake of the user."""
    def function(run, log):
        """Fail."""
        raise ValueError("a bug")

    minirlhf.FUNCTIONS["sft"] = function
    with pytest.raises(ValueError, match="a bug"):
        minirlhf.main(["--out", str(tmp_path)])


def test_only_the_named_stages_run_in_their_order(tmp_path, instant):
    """--stages goes nowhere."""
    assert minirlhf.main(["--stages", "pretrain,report", "--out", str(tmp_path)]) == 0
    assert minirlhf.main(["--stages", "dpo,ppo", "--out", str(tmp_path)]) == 0
    assert instant == ["pretrain", "report", "dpo", "ppo"]


@pytest.mark.slow
def test_exit_status_and_silence_in_a_real_shell(tmp_path):
    """The one line and the status 2 exist only inside the tests' process."""
    command = [sys.executable, str(ROOT / "minirlhf.py"), "--n-head", "7"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1


# ---- the user's own preference files -------------------------------------------------------------------------------

def write_pairs(path, n, layout):
    """n pairs about films and hotels, as three texts each or as whole transcripts. Returns the rows of three texts."""
    rng = random.Random(0)
    rows, lines = [], []
    for prompt in world.make_prompts(0, n, 1)[0]:
        good, bad = [world.make_review(rng, world.subject_of(prompt), mood, 2) for mood in (1.0, 0.0)]
        if layout == "transcripts":
            prompt = f"\n\nHuman: {prompt}\n\nAssistant:"
            lines.append({"chosen": f"{prompt} {good}", "rejected": f"{prompt} {bad}"})
        else:
            lines.append({"prompt": prompt, "chosen": good, "rejected": bad})
        rows.append({"prompt": prompt, "chosen": f" {good}", "rejected": f" {bad}"})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    if layout == "three texts":
        text += json.dumps({"prompt": "twice", "chosen": "same", "rejected": "same"}) + "\n"
        rows.append({"prompt": "twice", "chosen": " same", "rejected": " same"})
    with gzip.open(path, "wt") if path.suffix == ".gz" else open(path, "w") as file:
        file.write(text)
    return rows


OWN = "--pretrain-steps 4 --sft-steps 4 --ppo-iterations 1 --ppo-batch 8 --minibatch 8".split()


@pytest.mark.parametrize("layout, name, wanted", [
    pytest.param("three texts", "pairs.jsonl", "pretrain,sft,preferences,reward,ppo,dpo,report",
                 marks=pytest.mark.slow),
    ("transcripts", "talks.jsonl.gz", "pretrain,sft,preferences")])
def test_own_data_runs_to_the_end(layout, name, wanted, tiny_quick, tmp_path, monkeypatch, capsys):
    """
    The data path asks the oracle of the built-in world, invents a gold that is not there, or learns other texts; or a
    large file is read several times.
    """
    seen, asked, read = [], [], []
    train_sft, sample_policy, read_pairs = stages.train_sft, stages.sample_policy, run_module.read_pairs

    def recording_reads(path):
        read.append(path)
        return read_pairs(path)

    def recording_sft(network, examples, *rest):
        seen.append(examples)
        return train_sft(network, examples, *rest)

    def recording_samples(policy, prompts, *rest):
        asked.append(prompts)
        return sample_policy(policy, prompts, *rest)

    monkeypatch.setattr(stages, "train_sft", recording_sft)
    monkeypatch.setattr(stages, "sample_policy", recording_samples)
    monkeypatch.setattr(run_module, "read_pairs", recording_reads)
    rows = write_pairs(tmp_path / name, 80, layout)
    folder = tmp_path / "run"
    sizes = ["--block-size", "60", "--response-tokens", "40"]
    flags = ["--quick", "--data", str(tmp_path / name), "--out", str(folder), "--stages", wanted]
    few_steps = OWN if "ppo" in wanted else OWN[:4]
    assert minirlhf.main([*flags, *sizes, *few_steps]) == 0
    out = capsys.readouterr().out
    assert read == [str(tmp_path / name)]

    run = Run(parse_config(["--stages", "report", "--out", str(folder)]))
    encode, end = run.tokenizer.encode_ordinary, run.tokenizer.n_vocab - 2
    known = {}  # the rows by prompt, in ids
    for row in rows:
        responses = [(encode(row[side]) + [end])[:40] for side in ("chosen", "rejected")]
        known[tuple(encode(row["prompt"])[-20:])] = responses
    train, heldout = run.pairs()
    assert len(train) + len(heldout) == 80 and len(heldout) == 8
    for row in train + heldout:
        assert [row["chosen"], row["rejected"]] == known[tuple(row["prompt"])]
        assert "gold" not in row
    documents, demonstrations = seen
    texts = {run.tokenizer.decode(response[:-1]) for _, response in documents if response[-1] == end}
    assert texts <= {row["prompt"] + row[side] for row in rows for side in ("chosen", "rejected")} and len(texts) > 100
    trained_on = [(row["prompt"], row["chosen"]) for row in train]
    assert demonstrations == trained_on
    if layout == "three texts":
        assert "1 pairs dropped because their two responses are the same" in out
    if "report" not in wanted:
        return
    report = json.loads((folder / "report.json").read_text())
    assert all(row["gold"] is None and row["win_rate"] is None for row in report["policies"].values())
    assert report["optimum"]["gold"] is None
    right = report["reward_model"]["accuracy"] * len(heldout)
    assert right == pytest.approx(round(2 * right) / 2, abs=1e-4)
    assert report["reward_model"]["gold_accuracy"] is None and report["reward_model"]["label_ceiling"] is None
    assert report["reward_model"]["pairs"] == len(train)
    prompts = run.prompts()[0]
    assert asked == [[prompts[i % len(prompts)] for i in range(1024)]]  # what scores are normalised on
    assert "this data has no oracle" in out and "NaN" not in (folder / "report.json").read_text()
    assert minirlhf.main(["--stages", "trace", "--prompt", "hello", "--out", str(folder)]) == 0
    assert "; gold -" in capsys.readouterr().out


def test_what_is_cut_and_dropped_is_counted(tiny, tmp_path):
    """Texts are cut in silence, or the counts of one split are forgotten."""
    rows = [{"prompt": f"prompt {i}", "chosen": " a b", "rejected": " c"} for i in range(40)]
    rows[3:5] = [{"prompt": "long " * 30, "chosen": " a" * 50, "rejected": " b" * 60}] * 2
    rows[7] = {"prompt": "x", "chosen": " y", "rejected": " y"}
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = Run(Config(data=str(tmp_path / "pairs.jsonl"), out=str(tmp_path / "run"), block_size=60, response_tokens=40))
    run.write("tokenizer.json", (tiny / "tokenizer.json").read_text())
    run.make_split()
    line = stages.run_preferences(run, lambda **row: None)
    assert line == ("39 pairs; 2 prompts cut on the left, 4 responses cut on the right, 1 pairs dropped because their "
                    "two responses are the same")


def test_data_whose_pairs_are_all_equal_is_one_line(tiny, tmp_path):
    """A file in which nothing is left ends in a traceback in a later stage."""
    row = {"prompt": "x", "chosen": " y", "rejected": " y"}
    lines = [json.dumps({**row, "prompt": f"prompt {i}"}) + "\n" for i in range(30)]
    (tmp_path / "pairs.jsonl").write_text("".join(lines))
    run = Run(Config(data=str(tmp_path / "pairs.jsonl"), out=str(tmp_path / "run")))
    run.write("tokenizer.json", (tiny / "tokenizer.json").read_text())
    with pytest.raises(UserError, match="the two responses are the same in every pair"):
        run.make_split()


def test_broken_data_keeps_what_was_good(tiny_copy, tmp_path, capsys):
    """A broken line is found after the old run's files were overwritten."""
    path = tmp_path / "broken.jsonl"
    path.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n{"prompt": "a", "chosen": "b"}\n')
    before = {file.name: file.read_bytes() for file in tiny_copy.iterdir()}
    for folder in (tiny_copy, tmp_path / "new"):
        assert minirlhf.main(["--data", str(path), "--overwrite", "--out", str(folder)]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and f'{path}, line 2: the key "rejected" is missing' in error
    assert not (tmp_path / "new").exists()
    assert {file.name: file.read_bytes() for file in tiny_copy.iterdir()} == before
