"""
The page of a run: its data, computed a second time from the files of the run without the code of the page, and the page
in a real browser, if there is one: apt-get install chromium
"""

import base64
import contextlib
import html
import io
import json
import math
import re
import shutil
import subprocess

import pytest
import torch
from conftest import make_run
from helpers import page_data

import minirlhf
from pipeline import episode as episode_module
from pipeline import page as page_module
from pipeline import stages
from pipeline.config import POLICIES, Config, read_settings
from pipeline.diagnose import diagnose, verdicts
from pipeline.report import make_table, shown
from pipeline.run import Run
from pipeline.scores import make_scorer

SHOWN = 8  # held-out prompts
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def data(tiny):
    return page_data(tiny)[0]


def near(x, tolerance=2e-4):
    return pytest.approx(x, abs=tolerance)


# ---- an episode, token by token --------------------------------------------------------------------------------------

def discounted_errors(rewards, values, gamma, lam):
    """GAE as its definition: a sum over all later temporal-difference errors."""
    errors = [r + gamma * after - value for r, value, after in zip(rewards, values, [*values[1:], 0])]
    return [sum((gamma * lam) ** (k - t) * errors[k] for k in range(t, len(errors))) for t in range(len(errors))]


@pytest.mark.parametrize("name, policy, critic", [
    ("sft", "sft", None), ("dpo", "dpo", None), ("ppo", "ppo", "ppo_critic"),
    ("ppo_no_kl", "ppo_no_kl", "ppo_no_kl_critic"), ("PPO before training", "sft", "reward")])
def test_an_episode_token_by_token(name, policy, critic, files, data):
    """Bug: a number is at another token, the beta is another policy's, or a policy borrows the critic of PPO."""
    config = files.config
    beta = 0 if name == "ppo_no_kl" else config["beta"]
    assert list(data["episodes"]) == ["pretrained", "sft", *files.policies, "PPO before training"]
    for i, prompt in list(enumerate(files.heldout()[:SHOWN]))[::3]:
        e, response = data["episodes"][name][i], files.sample(policy, [prompt], config["seed"] + sum(prompt))[0]
        logp, ref_logp = files.logprobs(policy, prompt, response), files.logprobs("sft", prompt, response)
        score = files.scores("reward", prompt + response)[-1]
        assert data["prompts"][i] == files.text(prompt)
        assert e["tokens"] == [episode_module.token_text(files.tokenizer, token) for token in response]
        assert e["text"] == shown(files.text(response))
        assert e["finished"] == (response[-1] == files.end)
        assert [e["score"], e["gold"], e["beta"]] == near([score, files.gold(prompt, response), beta])
        for t, token in enumerate(response):
            pi, ref = float(logp[t, token]), float(ref_logp[t, token])
            assert [e["logp"][t], e["ref_logp"][t], e["prob"][t]] == near([pi, ref, math.exp(pi)])
            assert e["kl_terms"][t] == near(-beta * (pi - ref))
            assert e["rewards"][t] == near(-beta * (pi - ref) + (score if t == len(response) - 1 else 0))
            assert e["entropy"][t] == near(-sum(math.exp(x) * x for x in logp[t].tolist()))
        assert ("values" in e) == ("advantages" in e) == (critic is not None)
        if critic:
            values = files.scores(critic, prompt + response)[len(prompt) - 1:-1]
            assert e["values"] == near(values)
            advantages = discounted_errors(e["rewards"], values, config["gamma"], config["lam"])
            assert e["advantages"] == near(advantages, 1e-3)


def test_a_token_is_one_line_and_a_part_of_a_character_is_its_bytes(files):
    """Bug: half an emoji becomes a question mark or a traceback, a line break breaks the row of tokens."""
    tokens = (0xf0, 0x9f, ord("<"), ord("\n"), files.end)
    assert [episode_module.token_text(files.tokenizer, token) for token in tokens] == ["\\xf0", "\\x9f", "<", "⏎", "E"]


# ---- answers in the course of training -------------------------------------------------------------------------------

def test_watched_answers_are_those_of_the_policy_at_that_moment(files, data):
    """Bug: the answers are another moment's, to training prompts, with other random numbers, or of another reward."""
    prompts, seed = files.heldout()[:SHOWN], files.config["seed"]
    for name in ("ppo", "grpo", "ppo_no_kl"):
        rows = [row for row in data["watch"] if row["stage"] == name]
        assert [(row["step"], row["when"]) for row in rows] == [
            (-1, "before training"), *[(n, f"after iteration {n + 1}") for n in range(len(files.metrics(name)))]]
        for row, policy in ((rows[0], "sft"), (rows[-1], name)):
            responses = files.sample(policy, prompts, seed)
            assert row["texts"] == [shown(files.text(response)) for response in responses]
            scores = [files.scores("reward", prompt + response)[-1] for prompt, response in zip(prompts, responses)]
            assert row["score"] == near(scores)
            assert row["gold"] == near([files.gold(prompt, response) for prompt, response in zip(prompts, responses)])


def test_watching_draws_no_random_number_and_changes_no_network(smallest):
    """Bug: watching a training changes it, or its last answers are not watched."""
    run = Run(smallest, Config(**{**read_settings(smallest), "ppo_iterations": 40}), "cpu")
    policy = run.load_network("ppo")
    before = [tensor.clone() for tensor in policy.state_dict().values()]
    observe = stages.make_watcher(run, "ppo", policy, make_scorer(run))
    state = torch.get_rng_state()
    for metrics in [None, *[dict(step=step) for step in range(40)]]:
        observe(metrics, None)
    assert [row["step"] for row in run.rows("watch.jsonl")[-12:]] == [round(i * 40 / 11) - 1 for i in range(12)]
    assert torch.equal(torch.get_rng_state(), state)
    assert all(map(torch.equal, before, policy.state_dict().values()))


# ---- the numbers of the run ------------------------------------------------------------------------------------------

def test_curves_are_the_logged_numbers(files, data):
    """Bug: a curve is smoothed, shifted, cut or another stage's; an axis says step where it is iterations."""
    assert list(data["curves"]) == ["pretrain", "sft", "reward", "dpo", "ppo", "grpo", "ppo_no_kl"]
    for stage, curve in data["curves"].items():
        rows, sampled = files.metrics(stage), stage in ("ppo", "grpo", "ppo_no_kl")
        assert curve["unit"] == ("iteration" if sampled else "step") and curve["size"] == 1
        assert curve["loop"] == (POLICIES[stage][1] if stage in POLICIES else stage)
        logged = set(rows[-1]) - {"stage"} - ({"objective"} if stage == "ppo_no_kl" else set())
        assert set(curve["columns"]) == logged
        for metric, values in curve["columns"].items():
            assert values == pytest.approx([row[metric] for row in rows], rel=1e-5, abs=1e-12)
        assert ("equal_groups" in curve["healthy"]) == (stage == "grpo")


@pytest.mark.parametrize("n", [1, 300, 301])
def test_a_long_curve_is_thinned_to_means_of_equal_parts(n):
    """Bug: a long run makes a page of countless points, the last steps are dropped, a peak is counted twice."""
    rows = [dict(stage="ppo", step=step, score=step ** 2 % 17) for step in range(n)]
    curve = page_module.make_curves(Run(".", Config(), "cpu"), dict(ppo=rows))["ppo"]
    parts = [range(at, min(at + curve["size"], n)) for at in range(0, n, curve["size"])]
    assert len(parts) == (n if n <= 300 else 151) and parts[-1][-1] == n - 1
    assert curve["columns"]["step"] == [sum(part) / len(part) for part in parts]
    assert curve["columns"]["score"] == pytest.approx([sum(x ** 2 % 17 for x in part) / len(part) for part in parts])


def test_the_table_and_the_facts(files, data):
    """Bug: the page has another table than the terminal, settings are the defaults, another network is counted."""
    report, facts = files.report, dict(data["facts"])
    assert data["table"] == make_table(report)  # test_report.py has one by hand
    saved = torch.load(files.folder / "sft.pt", weights_only=True)["network"]
    assert facts["network"] == f"{sum(tensor.numel() for tensor in saved.values()):,} parameters"
    assert {name: str(value) for name, value in report["config"].items()}.items() <= facts.items()
    assert f"accuracy {report['reward_model']['accuracy']:.3f}" in facts["reward model"]
    assert f'"the longer answer wins" {report["reward_model"]["longer_chosen"]:.3f}' in facts["reward model"]
    assert data["name"] == files.folder.name and data["report"] == report
    assert sum(note.startswith("warning: ") for note in data["notes"]) == len(report["warnings"])


def test_the_frontier_draws_all_that_is_near_and_names_the_rest(files, data):
    """Bug: a policy is called too far away and drawn all the same, or is neither drawn nor named."""
    rows, frontier = dict(files.report["policies"]), data["frontier"]
    far = 1.6 * max(row["kl"] for name, row in rows.items() if name != "pretrained")
    assert frontier["near"] == [name for name, row in rows.items() if row["kl"] <= far and name != "best_of_n"]
    assert frontier["away"] == [name for name, row in rows.items() if row["kl"] > far]
    best = {key: rows["best_of_n"][key] for key in ("score", "gold", "kl")}  # which test_report.py recomputes
    assert frontier["best_of_n"][-1] == dict(best, n=files.config["best_of"])
    assert frontier["optimum"] == [point for point in files.report["frontier"]["optimum"] if point["kl"] <= far]
    assert set(frontier["trails"]) == {"ppo", "grpo", "ppo_no_kl"}
    for name, trail in frontier["trails"].items():
        assert trail["kl"] == near([row["kl"] for row in files.metrics(name)])
    rows["pretrained"] = dict(rows["pretrained"], kl=2 * far)
    assert page_module.make_frontier(dict(files.report, policies=rows), {})["away"] == ["pretrained", *frontier["away"]]


def made_result(**policies):
    """A report.json of made-up rows: (gold, score, share, wins), the first of which is SFT's."""
    rows = {name: dict(gold=gold, gold_se=0.1 if gold is not None else None, score=score, optimum_share=share,
                       win_rate=wins) for name, (gold, score, share, wins) in policies.items()}
    return dict(policies=rows, reward_model=dict(accuracy=0.8), warnings=[])


def test_the_headline_tells_success_from_collapse():
    """Bug: the big number praises a policy whose score rose while its true reward fell, or needs a true reward."""
    result = made_result(sft=(0.0, 0.0, 0.0, 0.5), ppo=(1.0, 2.0, 0.87, 0.9), ppo_no_kl=(-2.3, 2.0, -3.3, 0.01),
                         grpo=(-0.25, 2.0, 0.5, 0.4), dpo=(0.3, 0.5, None, 0.6), ipo=(-1.0, -0.5, 0.1, 0.2))
    result["warnings"] = ["DPO over-optimised: from iteration 3 on gold fell while the score rose"]
    cards = verdicts(result)
    assert [(card["label"], card["big"], card["collapsed"]) for card in cards] == [
        ("PPO", "87%", False), ("PPO, no KL", "-2.30", True), ("GRPO", "50%", False), ("DPO", "+0.30", True),
        ("IPO", "10%", False)]
    assert "better than SFT in 90% of comparisons" in cards[0]["text"] and "rose to +2.00" in cards[1]["text"]
    [card] = verdicts(made_result(sft=(None, 0.1, None, None), ppo=(None, 1.25, None, None)))
    assert card == dict(label="PPO", big="+1.25", text="in score, where SFT has +0.10.", collapsed=False)


# ---- the state of a run, in words ------------------------------------------------------------------------------------

SAMPLED = dict(kl=2.0, length=20.0, finished=1.0, entropy=1.5, clip_fraction=0.1, approx_kl=0.01, ratio_error=0.0)
WELL = dict(ppo=dict(SAMPLED, explained_variance=0.5, score=1.0),
            grpo=dict(SAMPLED, equal_groups=0.1, grad_norm=0.5, loss=0.3),
            dpo=dict(loss=0.5, margin=1.0, accuracy=0.8, chosen_reward=0.3))


def states(stage, rows):
    return diagnose(made_result(sft=(0.0, 0.0, 0.0, 0.5)), {stage: rows})


@pytest.mark.parametrize("stage, metric, value, words", [
    ("ppo", "kl", 0.0, "the KL stays 0"), ("ppo", "kl", 31.4, "31 nats from SFT"),
    ("grpo", "equal_groups", 0.97, "in 97% of the groups all scores are equal, and nothing is learned"),
    ("grpo", "grad_norm", 0.0, "the gradient is 0"), ("grpo", "loss", 0.001, "a loss of 0 is right here"),
    ("ppo", "entropy", 0.01, "collapsed"), ("ppo", "clip_fraction", 0.4, "40% of the tokens are outside the clip"),
    ("grpo", "approx_kl", 0.2, "0.20 nats a token"), ("ppo", "explained_variance", -0.3, "the critic predicts"),
    ("ppo", "finished", 0.25, "only 25% of the answers end by themselves"),
    ("ppo", "length", 3.0, "less than half as long"), ("grpo", "length", 60.0, "more than twice as long"),
    ("dpo", "chosen_reward", -0.5, "chosen answers became less likely")])
def test_each_state_is_named_from_how_the_run_ended(stage, metric, value, words):
    """Bug: a state is not told, or of another policy, of a healthy run, of few iterations, or of how the run began."""
    well, ill = WELL[stage], {**WELL[stage], metric: value}
    assert states(stage, [well] * 40) == states(stage, [ill] * 9) == []
    [sentence] = states(stage, [well] * 36 + [ill] * 4 if metric != "loss" else [ill] * 40)
    assert sentence.startswith(f"{POLICIES[stage][0]}: ") and words in sentence
    if metric not in ("loss", "length"):
        assert states(stage, [ill] * 36 + [well] * 4) == []


@pytest.mark.parametrize("accuracy, longer, words", [(0.62, 0.36, '"the {} answer is better" 64%'),
                                                     (0.65, 0.64, None), (0.6, None, None), (0.5, 0.5, None)])
def test_a_reward_model_that_is_no_better_than_length(accuracy, longer, words):
    """Bug: a reward model that has learned length alone is not told from one that has learned more."""
    for key, side in (("longer_chosen", "shorter"), ("first_chosen", "second")):
        found = diagnose(dict(reward_model={"accuracy": accuracy, key: longer}), {})
        assert [words.format(side) in sentence for sentence in found] == ([True] if words else [])


# ---- several runs ----------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def two_runs(shared, tmp_path_factory):
    """Two copies of the smallest run, the second with another beta and score, and what --compare prints of them."""
    runs = tmp_path_factory.mktemp("runs")
    folders = [shutil.copytree(shared("smallest", make_run), runs / name) for name in ("a", "b")]
    settings, report = [json.loads((folders[1] / name).read_text()) for name in ("config.json", "report.json")]
    settings["beta"] = report["config"]["beta"] = 0.75
    report["policies"]["ppo"]["score"] = 7.77
    (folders[1] / "config.json").write_text(json.dumps(settings))
    (folders[1] / "report.json").write_text(json.dumps(report))
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert minirlhf.main(["--compare", *map(str, folders)]) == 0
    return folders, out.getvalue()


def test_compare_lays_runs_side_by_side(two_runs):
    """Bug: the runs change places, a difference is not named, or samples and curves of one run are shown for both."""
    folders, out = two_runs
    assert out.endswith(f"open {folders[0].parent / 'compare.html'}\n") and out.startswith(f"{folders[0]}\npolicy ")
    assert f"{folders[1]}: beta 0.75 policy " in " ".join(out.split()) and out.count("7.77") == 1
    [data] = page_data(folders[0])
    compared = (folders[0].parent / "compare.html").read_text()
    a, b = json.loads(re.search('id="data">(.*?)</script>', compared, re.S)[1])
    assert [a["name"], b["name"]] == list(map(str, folders)) and [a["changes"], b["changes"]] == ["", "beta 0.75"]
    for run in (a, b):
        assert run["curves"] == data["curves"] and run["prompts"] == data["prompts"]
        assert list(run["episodes"]) == ["pretrained", "sft", "dpo", "ppo"]
        for name, answers in run["episodes"].items():
            assert answers == [{key: one[key] for key in ("text", "score", "gold")} for one in data["episodes"][name]]
    scores = [row[2].split()[0] for run in (a, b) for row in run["table"] if row[0] == "PPO"]
    assert scores[0] != "7.77" and scores[1:] == ["7.77"]


def test_whatever_the_texts_are_they_stay_texts():
    """Bug: a text ends the script that holds it, or is changed on its way into the page."""
    texts = ["</script><script>window.hacked = 1</script>", "<!-- <script>", "\0 \u2028", "&lt; \\u003c \\", "{DATA}"]
    page = page_module.fill([dict(prompts=texts)])
    assert page.count("</script>") == 2
    inside = re.search('id="data">(.*?)</script>', page, re.S)[1]
    assert "<" not in inside and inside.isascii() and json.loads(inside) == [dict(prompts=texts)]


# ---- in a browser ----------------------------------------------------------------------------------------------------

LOOK = """
const all = selector => [...document.querySelectorAll(selector)], one = selector => document.querySelector(selector);
const texts = selector => all(selector).map(node => node.textContent);
const details = one("#diagnosis details"), slider = one("#watch input");
details.open = true;
details.ontoggle({target: details});
const seen = {wide: document.body.scrollWidth, sections: all("section").map(node => node.id), numbers: {}};
seen.table = all("#table tr").map(row => [...row.childNodes].map(cell => cell.textContent));
for (const node of all(".grid > .card:has(pre)"))
  seen.numbers[node.querySelector("h3").textContent] ??= node.querySelector("pre").textContent;
const policy = all("#episode select")[1];
if (policy) {
  seen.sum = one("#episode .chips + p").textContent;
  policy.value = "PPO before training";
  policy.onchange();
  seen.tokens = texts("#episode .chip small");
  all("#episode .chip").at(-1).onclick();
}
seen.last = texts("#watch .card");
slider.value = 0;
slider.oninput();
seen.first = texts("#watch .card");
one("#watch button").click();
frameElement.after("SEEN" + btoa(unescape(encodeURIComponent(JSON.stringify(seen)))) + "NEES");
"""


def look(folder, *pages):
    """What LOOK sees in pages of some width, all in one browser. The console must have nothing to say."""
    if not CHROMIUM:
        pytest.skip("no Chromium is installed: apt-get install chromium")
    frames = []
    for width, path in pages:
        page = path.read_text(encoding="utf-8").replace("</body>", f"<script>{{{LOOK}}}</script></body>")
        frames.append(f'<iframe width="{width}" srcdoc="{html.escape(page)}"></iframe>')
    (folder / "page.html").write_text("<!doctype html>" + "".join(frames), encoding="utf-8")
    done = subprocess.run([CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
                           "--enable-logging=stderr", f"--user-data-dir={folder / 'profile'}", "--window-size=1400,900",
                           "--virtual-time-budget=4000", "--dump-dom", (folder / "page.html").as_uri()],
                          capture_output=True, text=True, encoding="utf-8", timeout=120)
    assert "CONSOLE" not in done.stderr, done.stderr
    return [json.loads(base64.b64decode(seen)) for seen in re.findall(r"SEEN([\w+/=]+)NEES", done.stdout)]


def test_the_pages_in_a_browser(tiny, data, two_runs, tmp_path):
    """
    Bug: the console complains, a phone has to scroll to the side, what is shown is another policy's or moment's, or a
    run of a comparison is missing in a plot.
    """
    folders, _ = two_runs
    seen, compared = look(tmp_path, (360, tiny / "report.html"), (1280, folders[0].parent / "compare.html"))
    assert seen["sections"] == ["table", "watch", "climb", "frontier", "episode", "diagnosis", "facts"]
    assert seen["wide"] <= 360 and seen["table"] == data["table"]
    columns = data["curves"]["ppo"]["columns"]
    head, *rows = seen["numbers"]["PPO: score and gold"].split("\n")
    assert head == "iteration\tscore\tgold"
    assert [[float(x) for x in row.split("\t")] for row in rows] == [
        list(row) for row in zip(columns["step"], columns["score"], columns["gold"])]
    head, *rows = [row.split("\t") for row in seen["numbers"]["Objective"].split("\n")]
    points = [row[head.index("PPO")] for row in rows]
    assert [float(y) for y in points if y != "-"] == near([data["report"]["policies"]["ppo"]["objective"]])
    advantages = data["episodes"]["PPO before training"][0]["advantages"]
    assert [float(number) for number in seen["tokens"]] == near(advantages, 0.0051)
    e = data["episodes"]["ppo"][0]
    paid = e["score"] - e["beta"] * (sum(e["logp"]) - sum(e["ref_logp"]))
    assert float(re.search(r"= (\S+); gold", seen["sum"])[1]) == near(paid, 0.0051)
    watched = [row for row in data["watch"] if row["stage"] == "ppo"]
    for cards, row in ((seen["first"], watched[0]), (seen["last"], watched[-1])):
        [card] = [card for card in cards if card.startswith(f" PPO {row['when']}")]
        assert row["texts"][0] in card and f"{row['gold'][0]:.2f}" in card
    assert compared["wide"] <= 1280 and compared["sections"] == ["table", "watch", "climb", "diagnosis", "facts"]
    a, b = map(str, folders)
    assert compared["numbers"]["DPO: accuracy"].startswith(f"step\t{a}\t{b}\n")
