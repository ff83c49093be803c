"""The folder of a run: files that are written whole or not at all, networks, metrics, prompts, pairs and gold."""

import dataclasses
import json
import math
import pickle
import random

import pytest
import torch
from helpers import make_batch, random_batch, random_texts, tiny_gpt

import minirlhf
import world
from data import UserError, collate, decode, end_id, make_tokenizer
from model import generate
from pipeline import progress
from pipeline import run as run_module
from pipeline.config import Config, parse_config
from pipeline.folder import MADE_BY
from pipeline.run import Run
from reward import RewardModel


@pytest.fixture
def empty(tmp_path):
    """A run in an empty folder."""
    return Run(Config(out=str(tmp_path / "run")))


@pytest.fixture
def finished(tiny):
    """The shared tiny run, for reading."""
    return Run(parse_config(["--stages", "report", "--out", str(tiny)]))


@pytest.fixture
def changed(tiny_copy):
    """A copy of the tiny run, for changing."""
    return Run(parse_config(["--stages", "report", "--out", str(tiny_copy)]))


def scored(model):
    """Scores of a reward model whose trunk has the sizes of helpers.tiny_gpt, a list."""
    with torch.no_grad():
        return model(random_batch()).tolist()


# ---- the folder ----------------------------------------------------------------------------------------------------

def test_the_folder_is_made(tmp_path):
    """A run in a folder of a folder that does not exist ends in a traceback."""
    assert Run(Config(out=str(tmp_path / "a" / "b"))).folder.is_dir()


@pytest.mark.parametrize("below", ["", "/deeper"])
def test_a_file_in_place_of_the_folder(below, tmp_path, capsys):
    """A folder that cannot be made ends in a traceback, or the file in its place is lost."""
    (tmp_path / "runs").write_text("mine")
    assert minirlhf.main(["--quick", "--out", f"{tmp_path}/runs{below}"]) == 2
    error = capsys.readouterr().err
    assert "cannot be the folder of a run" in error and "name another one with --out" in error
    assert error.count("\n") == 1 and (tmp_path / "runs").read_text() == "mine"


def test_the_device(monkeypatch):
    """A GPU that is there is not used, or one that the user declined is."""
    for there, option, expected in ((True, "", "cuda"), (True, "cpu", "cpu"), (False, "", "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert Run(Config(out=".", device=option)).device.type == expected


# ---- files ---------------------------------------------------------------------------------------------------------

def test_a_text_is_written_and_read(empty):
    """A file has other content than what was written, or the part file stays."""
    empty.write("tokenizer.json", json.dumps([" é", "β"]))
    assert empty.read("tokenizer.json") == [" é", "β"]
    assert [path.name for path in empty.folder.iterdir()] == ["tokenizer.json"]


@pytest.mark.parametrize("content", ["half of it \udcff", dict(weights=torch.zeros(1000), fault=lambda: None)])
def test_a_write_that_fails_leaves_the_old_file(empty, content):
    """A file is written in place: a run that is stopped in the middle of it destroys the last good one."""
    empty.write("ppo.pt", "the last good one")
    with pytest.raises((UnicodeEncodeError, pickle.PicklingError, AttributeError)):
        empty.write("ppo.pt", content)
    assert (empty.folder / "ppo.pt").read_text() == "the last good one"


def test_the_new_file_takes_its_place_in_one_step(empty, monkeypatch):
    """The old file is removed before the new one is whole: between the two there is none."""
    empty.write("sft.pt", "old")
    seen = []

    def replace(part, target):
        seen.append((open(part).read(), open(target).read(), target.name))

    monkeypatch.setattr(progress.os, "replace", replace)
    empty.write("sft.pt", "new")
    assert seen == [("new", "old", "sft.pt")]


@pytest.mark.parametrize("name", MADE_BY)
def test_a_missing_file_names_its_stage(empty, name):
    """A traceback instead of a hint when an earlier stage has not run, or a hint at the wrong stage."""
    stages = {"tokenizer.json": "pretrain", "split.jsonl": "pretrain", "data.json": "pretrain",
              "tokens.pt": "pretrain", "pretrained.pt": "pretrain", "sft.pt": "sft", "gold.json": "preferences",
              "preferences.jsonl": "preferences", "reward.json": "reward", "reward.pt": "reward", "ppo.pt": "ppo",
              "critic.pt": "ppo", "grpo.pt": "grpo", "dpo.pt": "dpo", "report.json": "report"}
    with pytest.raises(UserError) as fault:
        empty.path(name)
    assert str(fault.value) == f"{empty.folder / name} is missing: run --stages {stages[name]} first"


@pytest.mark.parametrize("gone, stage, maker", [
    ("reward.pt", "ppo", "reward"), ("sft.pt", "dpo", "sft"), ("preferences.jsonl", "reward", "preferences"),
    ("pretrained.pt", "sft", "pretrain"), ("tokenizer.json", "preferences", "pretrain"),
    ("gold.json", "report", "preferences")])
def test_a_missing_stage_is_one_line(changed, gone, stage, maker, capsys):
    """A traceback when an earlier stage has not run; or what this stage made before is lost."""
    (changed.folder / gone).unlink()
    before = (changed.folder / "ppo.pt").read_bytes()
    assert minirlhf.main(["--stages", stage, "--out", str(changed.folder)]) == 2
    error = capsys.readouterr().err.split("minirlhf: ")[-1]
    assert error == f"{changed.folder / gone} is missing: run --stages {maker} first\n"
    assert (changed.folder / "ppo.pt").read_bytes() == before


@pytest.mark.parametrize("name, stage, maker", [
    ("sft.pt", "ppo", "sft"), ("reward.pt", "report", "reward"), ("tokenizer.json", "sft", "pretrain"),
    ("gold.json", "report", "preferences"), ("preferences.jsonl", "dpo", "preferences")])
def test_a_damaged_file_is_one_line(changed, name, stage, maker, capsys):
    """A half-written file ends in a traceback."""
    path = changed.folder / name
    path.write_bytes(path.read_bytes()[:len(path.read_bytes()) // 2])
    assert minirlhf.main(["--stages", stage, "--out", str(changed.folder)]) == 2
    error = capsys.readouterr().err.split("minirlhf: ")[-1]
    assert error == f"{path} is damaged: run --stages {maker} again\n"


def test_half_a_line_of_metrics_is_no_end(changed):
    """A run that was killed while it logged a line cannot be continued: every later command ends in a traceback."""
    path = changed.folder / "metrics.jsonl"
    path.write_text(path.read_text() + '{"stage": "ppo", "st')
    log = changed.begin_metrics("report")
    log(step=0)
    assert changed.metrics()[-1] == dict(stage="report", step=0)


class Intruder:
    def __reduce__(self):
        return print, ("code from a checkpoint runs",)


@pytest.mark.parametrize("content", [dict(network={}), dict(config={}, network={}), [1, 2], Intruder()])
def test_a_network_of_another_kind_is_damaged(empty, content, capsys):
    """A checkpoint of something else ends in a traceback; or code that it holds is run."""
    torch.save(content, empty.folder / "sft.pt")
    with pytest.raises(UserError, match="sft.pt is damaged: run --stages sft again"):
        empty.load_network("sft")
    assert capsys.readouterr().out == ""


def test_networks_survive_the_folder(empty):
    """A network changes on its way through the folder: the score's head, its mean and its std are lost."""
    torch.manual_seed(0)
    policy = tiny_gpt(seed=1, dtype=torch.float32)
    model = RewardModel(policy)
    model.mean.fill_(0.3)
    model.std.fill_(2.0)
    ids = torch.tensor([[1, 2, 3]])
    empty.save_network("dpo", policy)
    assert torch.equal(empty.load_network("dpo")(ids), policy(ids))
    for name in ("reward", "critic"):
        empty.save_network(name, model)
        loaded = empty.load_network(name)
        assert scored(loaded) == scored(model)
        assert loaded.mean.item() == pytest.approx(0.3) and loaded.std.item() == 2.0


def test_a_loaded_network_is_frozen(finished):
    """The reference or the reward model is trained along with the policy."""
    for name in ("pretrained", "sft", "ppo", "dpo", "reward", "critic"):
        network = finished.load_network(name)
        assert not network.training
        assert not any(parameter.requires_grad for parameter in network.parameters())
        assert isinstance(network, RewardModel) == (name in ("reward", "critic"))


def test_the_saved_settings(finished):
    """A setting that later stages need is not saved; or the folder is, and a run that was moved looks there."""
    names = {field.name for field in dataclasses.fields(Config)}
    names -= {"out", "stages", "prompt", "device", "resume", "overwrite"}
    assert set(finished.saved_config()) == names
    assert json.loads((finished.folder / "config.json").read_text()) == finished.saved_config()


def test_the_tokenizer_is_that_of_pretraining(finished):
    """A stage builds a tokenizer of its own, with other ids for the same words."""
    pieces = json.loads((finished.folder / "tokenizer.json").read_text())
    text = "i really loved the camera . qwertz"
    assert finished.tokenizer.encode_ordinary(text) == make_tokenizer(pieces).encode_ordinary(text)
    assert 100 < len(pieces) < finished.config.vocab_size


# ---- metrics -------------------------------------------------------------------------------------------------------

def test_a_stage_replaces_its_own_metrics_only(empty):
    """A stage run again leaves its old rows beside the new ones, or deletes those of other stages."""
    for stage in ("sft", "ppo"):
        log = empty.begin_metrics(stage)
        log(step=0, loss=1.0)
        log(step=1, loss=0.5)
    empty.begin_metrics("sft")(step=0, loss=9.0)
    assert empty.metrics() == [dict(stage="ppo", step=0, loss=1.0), dict(stage="ppo", step=1, loss=0.5),
                               dict(stage="sft", step=0, loss=9.0)]


def test_seconds_and_seeds_are_those_of_finished_stages_in_order(empty):
    """A stage that was stopped counts as finished, or the order is that of the stages and not that of their ends."""
    for stage, seconds in (("ppo", 3.04), ("dpo", 2.0), ("sft", 1.26), ("dpo", 5.01)):
        empty.config.seed = round(seconds)
        empty.finish(stage, seconds)
    assert list(empty.used("seconds").items()) == [("ppo", 3.0), ("sft", 1.3), ("dpo", 5.0)]
    assert empty.used("seed") == dict(ppo=3, sft=1, dpo=5)
    empty.stage = "dpo"  # it runs again
    assert list(empty.used("seconds")) == ["ppo", "sft"]


# ---- prompts, pairs and gold ---------------------------------------------------------------------------------------

def texts_of(run, prompts):
    return [decode(run.tokenizer, prompt) for prompt in prompts]


def test_training_and_evaluation_have_different_prompts(finished):
    """A policy is evaluated on prompts that it was trained on, for which the seed of a later stage is enough."""
    train, heldout = finished.prompts()
    expected = world.make_prompts(finished.config.seed, 4000, 512)
    later = Run(dataclasses.replace(finished.config, seed=finished.config.seed + 1, held_out="film"))
    assert later.prompts() == (train, heldout)
    assert texts_of(finished, train) == expected[0]
    assert texts_of(finished, heldout) == expected[1][:finished.config.eval_prompts]
    assert not set(map(tuple, train)) & set(map(tuple, heldout))


def test_the_seed_of_pretraining_chooses_the_split(changed):
    """The seed does not choose the prompts."""
    train, _ = changed.texts()
    changed.config.seed += 1
    changed.make_split()
    assert changed.texts()[0] != train and len(changed.texts()[0]) == 4000


def test_a_held_out_subject_is_for_evaluation_only(empty):
    """--held-out goes nowhere: the subject is trained on."""
    empty.config.held_out = "hotel"
    empty.make_split()
    train, heldout = empty.texts()
    assert not any("hotel" in text["prompt"] for text in train)
    assert any("hotel" in text["prompt"] for text in heldout)


def test_more_prompts_to_evaluate_than_512(changed):
    """A larger evaluation repeats prompts although the world has more."""
    changed.config.eval_prompts = 600
    changed.make_split()
    heldout = changed.prompts()[1]
    assert len(set(map(tuple, heldout))) == len(heldout) == 600


def write_data(path, prompts):
    rows = [dict(prompt=prompt, chosen=f" good {i}", rejected=f" bad {i}") for i, prompt in enumerate(prompts)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


@pytest.fixture
def own(tmp_path):
    """A run with 40 prompts from a file, the first one of them longer than the room for it."""
    rows = write_data(tmp_path / "pairs.jsonl", ["very " * 30 + "long prompt"] + [f"prompt {i} :" for i in range(39)])
    run = Run(Config(out=str(tmp_path / "run"), data=str(tmp_path / "pairs.jsonl"), block_size=40, response_tokens=20,
                     eval_prompts=9))
    run.write("tokenizer.json", json.dumps([" long", " prompt", " good", " bad", "prompt", "very"]))
    run.make_split()
    return run, rows


def test_own_data_is_split_by_prompt(own):
    """A share of the data that is not a tenth is held out; or a pair is on both sides; or on none."""
    run, rows = own
    train, heldout = run.texts()
    assert len(train) == 36 and len(heldout) == 4
    assert sorted(train + heldout, key=str) == sorted(rows, key=str)
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in heldout}
    before = [run.path(name).read_bytes() for name in ("split.jsonl", "data.json")]
    run.make_split()
    assert [run.path(name).read_bytes() for name in ("split.jsonl", "data.json")] == before
    run.config.seed += 1
    assert run.texts() == (train, heldout)  # of the run, not of the stage
    run.make_split()
    assert run.texts() != (train, heldout)


def test_the_first_rows_do_not_stand_for_all(own):
    """The evaluation, or what scores are normalised on, is the top of a file that is sorted by topic."""
    run, rows = own
    first = [rows.index(row) for row in run.texts()[0][:12]]
    assert min(first) < 13 and max(first) > 26


def test_a_long_prompt_loses_its_left(own):
    """A prompt is cut on its right: the policy answers to the beginning of the text and not to its end."""
    run, rows = own
    train, heldout = run.prompts()
    encode = run.tokenizer.encode_ordinary
    longest = encode(rows[0]["prompt"])
    assert len(longest) > 20
    found = [prompt for prompt in train + heldout if prompt == longest[-20:]]
    assert len(found) == 1 and max(map(len, train + heldout)) == 20
    assert train == [encode(row["prompt"])[-20:] for row in run.texts()[0]]


def test_prompts_are_cut_anew(own):
    """Prompts that are cut once stay cut for stages with more room, or are not cut for those with less."""
    run, _ = own
    train, _ = run.prompts()
    run.config.response_tokens = 35
    assert run.prompts()[0] == [prompt[-5:] for prompt in train]
    run.config.response_tokens = 20
    assert run.prompts()[0] == train


def test_texts_are_encoded_once_in_a_run(own, monkeypatch):
    """Each stage encodes a large file again; or the ids are those of an older split, or of the other side."""
    run, _ = own
    expected = run.encode()
    run.write("tokens.pt", expected)
    calls = []
    monkeypatch.setattr(run_module, "encode_columns", lambda *arguments: calls.append(arguments))
    later = Run(run.config)
    train, _ = later.prompts()
    encode = run.tokenizer.encode_ordinary
    texts = run.texts()
    assert train == [encode(row["prompt"])[-20:] for row in texts[0]]
    for split, side in zip(("train", "heldout"), texts):
        pairs, counts = later.own_pairs(split)
        assert [pair["chosen"] for pair in pairs] == [[*encode(row["chosen"]), end_id(run.tokenizer)] for row in side]
        assert [pair["prompt"] for pair in pairs] == [encode(row["prompt"])[-20:] for row in side]
        assert counts["prompts_cut"] == sum(len(encode(row["prompt"])) > 20 for row in side)
    assert not calls
    monkeypatch.undo()
    later.config = dataclasses.replace(run.config, seed=7)
    later.make_split()
    assert later.prompts()[0] != train  # not those of the split before


def test_ids_that_are_missing_are_made_again(own):
    """A user who tidies up has to begin the run anew."""
    run, _ = own
    before = run.prompts(), run.own_pairs("train")
    assert not (run.folder / "tokens.pt").exists()
    run.write("tokens.pt", run.encode())
    assert (Run(run.config).prompts(), Run(run.config).own_pairs("train")) == before


@pytest.mark.parametrize("damage", [
    lambda tokens: [], lambda tokens: {"train": tokens["train"]}, lambda tokens: {**tokens, "heldout": {}},
    lambda tokens: {**tokens, "train": {"prompt": (torch.tensor([10 ** 6]), torch.tensor([1]))}},
    lambda tokens: {**tokens, "train": {**tokens["train"], "chosen": (torch.tensor([1, 2]), torch.tensor([1]))}},
    lambda tokens: {**tokens, "train": {**tokens["train"], "chosen": "text"}},
    lambda tokens: {**tokens, "code": random.Random(0)},  # an object of a class, whose code would run
])
def test_ids_that_are_damaged(damage, own):
    """An index error, or pairs that are left out in silence."""
    run, _ = own
    run.write("tokens.pt", damage(run.encode()))
    with pytest.raises(UserError, match="tokens.pt is damaged: run --stages pretrain again"):
        run.prompts()


def test_ids_of_a_world_are_no_pairs(own):
    """A file of prompts alone ends in a traceback where pairs are needed."""
    run, _ = own
    tokens = run.encode()
    run.write("tokens.pt", {split: {"prompt": tokens[split]["prompt"]} for split in tokens})
    with pytest.raises(UserError, match="tokens.pt is damaged: run --stages pretrain again"):
        run.own_pairs("train")


def test_few_prompts_are_repeated(own):
    """The evaluation has fewer prompts than the setting says, or only the first one again and again."""
    run, _ = own
    heldout = run.prompts()[1]
    few = [run.tokenizer.encode_ordinary(row["prompt"])[-20:] for row in run.texts()[1]]
    assert len(few) == 4 and heldout == [*few, *few, few[0]]


def test_too_few_pairs_are_one_line(tmp_path):
    """A file with next to nothing in it is trained on."""
    for n in (17, 18):
        write_data(tmp_path / f"{n}.jsonl", [f"prompt {i}" for i in range(n)])
    run = Run(Config(out=str(tmp_path), data=f"{tmp_path}/18.jsonl"))
    run.make_split()
    assert len(run.texts()[0]) == 16
    with pytest.raises(UserError, match="17.jsonl: 15 pairs to train on, at least 16 are needed"):
        Run(Config(out=str(tmp_path), data=f"{tmp_path}/17.jsonl")).make_split()


def test_pairs_are_those_of_their_split(empty):
    """Held-out pairs are trained on, or training pairs are evaluated."""
    rng = random.Random(0)
    empty.write("tokenizer.json", "[]")
    rows = [dict(split=rng.choice(["train", "heldout"]), prompt=[i], chosen=[1], rejected=[2]) for i in range(20)]
    empty.write("preferences.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    train, heldout = empty.pairs()
    assert train == [row for row in rows if row["split"] == "train"]
    assert heldout == [row for row in rows if row["split"] == "heldout"]


def test_gold_is_that_of_the_world_in_standard_deviations(finished):
    """Gold is that of another prompt, of a text with its E, or in points where standard deviations are due."""
    encode = finished.tokenizer.encode_ordinary
    end = finished.tokenizer.n_vocab - 2
    texts = [("i saw the new film with my boss yesterday .", " the plot was brilliant ."),
             ("we booked the new hotel with my boss yesterday .", " the plot was brilliant ."),
             ("i saw the new film with my boss yesterday .", " the plot was")]
    prompts = [encode(prompt) for prompt, _ in texts]
    responses = [encode(response) + [end] for _, response in texts]
    raw = finished.raw_gold(prompts, responses).tolist()
    assert raw == [world.gold(prompt, response) for prompt, response in texts] and len(set(raw)) == 3
    scale = json.loads((finished.folder / "gold.json").read_text())
    expected = [(points - scale["mean"]) / scale["std"] for points in raw]
    assert finished.gold(prompts, responses).tolist() == pytest.approx(expected, abs=1e-6)


def test_own_data_has_no_gold(own):
    """The data path asks the oracle of the built-in world, which knows nothing about these texts."""
    run, _ = own
    for gold in (run.gold([[1], [2]], [[3], [4]]), run.raw_gold([[1], [2]], [[3], [4]])):
        assert len(gold) == 2 and all(math.isnan(x) for x in gold.tolist())


# ---- what the policies maximise ------------------------------------------------------------------------------------

def test_gold_as_the_reward_is_asked_without_padding(tmp_path, monkeypatch):
    """The oracle reads the padding, or a response together with its prompt."""
    run = Run(Config(out=str(tmp_path), reward_from="gold"))
    asked = []

    def gold(prompts, responses):
        asked.append((prompts, responses))
        return torch.tensor([0.5, 2.0])

    monkeypatch.setattr(run, "gold", gold)
    scores = run.scorer()(collate([[1, 2], [3]], [[4], [5, 6]], pad=9))
    assert asked == [([[1, 2], [3]], [[4], [5, 6]])] and scores.tolist() == [0.5, 2.0]


# ---- gold in the place of the reward model ------------------------------------------------------------------------

def test_the_oracle_gives_the_gold_of_a_rollout(tiny):
    """The oracle gets the prompt of another row, or its numbers are not gold."""
    run = Run(parse_config(["--out", str(tiny), "--stages", "report"]))
    run.config.reward_from = "gold"
    prompts = run.prompts()[1][:6]
    rollout = generate(run.load_network("sft"), prompts, 12, generator=torch.Generator().manual_seed(0))
    assert torch.equal(run.scorer()(rollout), run.gold(prompts, rollout.response_ids()))


def test_the_oracle_gets_the_ids_of_each_row_without_padding():
    """Pads in the prompt, which a tokenizer may decode to nothing, so that gold hides the mistake."""
    class FakeRun:
        config = Config(reward_from="gold")

        def gold(self, prompts, responses):
            self.asked = list(zip(prompts, responses))
            return torch.zeros(len(prompts))

    prompts, responses = random_texts(seed=1, B=8)
    run = FakeRun()
    Run.scorer(run)(make_batch(prompts, responses))
    assert run.asked == list(zip(prompts, responses))
