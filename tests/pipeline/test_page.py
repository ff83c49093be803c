"""
The page of a run: its data, computed a second time from the files of the run without the code of the page, and the page
in a real browser, if there is one: apt-get install chromium
"""

import base64
import contextlib
import copy
import html
import io
import json
import math
import os
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
from ppo import gae

SHOWN = 8  # held-out prompts
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def data(tiny):
    return page_data(tiny)[0]


def near(x, tolerance=2e-4):
    return pytest.approx(x, abs=tolerance)


# ---- an episode, token by token --------------------------------------------------------------------------------------

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
            mask = torch.ones(1, len(response), dtype=torch.bool)
            advantages, _ = gae(*torch.tensor([[e["rewards"]], [values]]), mask, config["gamma"], config["lam"])
            assert e["advantages"] == near(advantages[0].tolist(), 1e-3)  # test_ppo.py has gae by its definition


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


def test_the_moments_that_are_watched(smallest):
    """Bug: a long training is watched after every iteration, or its last answers are not watched."""
    run = Run(smallest, Config(**{**read_settings(smallest), "ppo_iterations": 40}), "cpu")
    observe = stages.make_watcher(run, "ppo", run.load_network("ppo"), make_scorer(run))
    for metrics in [None, *[dict(step=step) for step in range(40)]]:
        observe(metrics, None)
    assert [row["step"] for row in run.rows("watch.jsonl")[-12:]] == [round(i * 40 / 11) - 1 for i in range(12)]


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


def test_the_table_and_the_facts(files, data, device):
    """Bug: the page has another table than the terminal, other settings or versions, another network is counted."""
    report, facts = files.report, dict(data["facts"])
    assert data["table"] == make_table(report)  # test_report.py has one by hand
    saved = torch.load(files.folder / "sft.pt", weights_only=True)["network"]
    assert facts["network"] == f"{sum(tensor.numel() for tensor in saved.values()):,} parameters"
    made = dict(files.config, torch=torch.__version__, device=device)
    assert {name: str(value) for name, value in made.items()}.items() <= facts.items()
    told = "accuracy accuracy_se label_ceiling gold_accuracy gold_accuracy_se longer_chosen first_chosen".split()
    numbers = [float(x) for x in re.findall(r"\d\.\d{3}", facts["reward model"])]
    assert numbers == near([report["reward_model"][name] for name in told], 0.00051)
    assert data["name"] == files.folder.name and data["report"] == report
    assert {*POLICIES, "pretrain", "sft", "reward", "robust"} <= data["names"].keys()  # all that log a curve
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
    ("grpo", "approx_kl", 0.16, "0.16 nats a token"), ("ppo", "explained_variance", -0.3, "the critic predicts"),
    ("ppo", "finished", 0.25, "only 25% of the answers end by themselves"),
    ("ppo", "length", 3.0, "less than half as long"), ("grpo", "length", 60.0, "more than twice as long"),
    ("dpo", "chosen_reward", -0.5, "chosen answers became less likely")])
def test_each_state_is_named_from_how_the_run_ended(stage, metric, value, words):
    """Bug: a state is not told, or of a healthy run, of few iterations, of the last one, or of how the run began."""
    well, ill = WELL[stage], {**WELL[stage], metric: value}
    assert states(stage, [well] * 39 + [ill]) == states(stage, [ill] * 9) == []
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
    """Copies of the smallest run, the second with another beta and score; what --compare prints; the page's data."""
    runs = tmp_path_factory.mktemp("runs")
    folders = [shutil.copytree(shared("smallest", make_run), runs / name) for name in ("a", "b/c")]
    settings, report = [json.loads((folders[1] / name).read_text()) for name in ("config.json", "report.json")]
    settings["beta"] = report["config"]["beta"] = 0.75
    report["policies"]["ppo"]["score"] = 7.77
    (folders[1] / "config.json").write_text(json.dumps(settings))
    (folders[1] / "report.json").write_text(json.dumps(report))
    os.utime(folders[1] / "report.json", (0, 0))
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert minirlhf.main(["--compare", *map(str, folders)]) == 0
    return folders, out.getvalue(), page_data(runs, "compare.html")


def test_compare_lays_runs_side_by_side(two_runs):
    """Bug: the runs change places, a difference is not named, or samples and curves of one run are shown for both."""
    folders, out, (a, b) = two_runs
    assert out.endswith(f"open {folders[0].parent / 'compare.html'}\n") and out.startswith(f"{folders[0]}\npolicy ")
    assert f"{folders[1]}: beta 0.75 policy " in " ".join(out.split()) and out.count("7.77") == 1
    [data] = page_data(folders[0])
    assert [a["name"], b["name"]] == list(map(str, folders)) and [a["changes"], b["changes"]] == ["", "beta 0.75"]
    for run in (a, b):
        assert run["curves"] == data["curves"] and run["prompts"] == data["prompts"]
        assert list(run["episodes"]) == ["pretrained", "sft", "dpo", "ppo"]
        for name, answers in run["episodes"].items():
            assert answers == [{key: one[key] for key in ("text", "score", "gold")} for one in data["episodes"][name]]
    assert dict(a["facts"])["date"][:2] == "20" and dict(b["facts"])["date"][:2] == "19"


def test_whatever_the_texts_are_they_stay_texts():
    """Bug: a text ends the script that holds it, or is changed on its way into the page."""
    texts = ["</script><script>window.hacked = 1</script>", "<!-- <script>", "\0 \u2028", "&lt; \\u003c \\", "{DATA}"]
    page = page_module.fill([dict(prompts=texts)])
    assert page.count("</script>") == 2
    inside = re.search('id="data">(.*?)</script>', page, re.S)[1]
    assert "<" not in inside and inside.isascii() and json.loads(inside) == [dict(prompts=texts)]


# ---- in a browser ----------------------------------------------------------------------------------------------------

LOOK = """
const all = (selector, node = document) => [...node.querySelectorAll(selector)];
const texts = (selector, node) => all(selector, node).map(node => node.textContent);
const values = (selector, names, node) => all(selector, node).map(
  node => names.split(" ").map(name => node.getAttribute(name)));
const details = $("#diagnosis details"), [prompts, policy] = all("#episode select"), seen = {on: [], sums: []};
const set = (select, value) => { select.value = value; select.onchange(); };
seen.wide = document.body.scrollWidth;
seen.sections = Object.fromEntries(all("#about, section").map(node => [node.id, node.textContent]));
seen.tables = all("table").map(table => all("tr", table).map(row => texts("td, th", row)));
seen.warnings = texts("#table .warning");
details.ontoggle({target: details});
details.ontoggle?.({target: details}); // closed and opened again
seen.metrics = texts("#diagnosis h3, #diagnosis pre").map(text => text.split("\\n")[0]);
for (const n of [150, 151]) {
  const step = [...Array(n).keys()], columns = {step, x: step.map(t => t === 75 ? 25 : 0)};
  panel(document.body, {keys: {x: ""}, title: `made ${n}`, band: true},
    [{stage: "ppo", r: run, unit: "iteration", size: n - 149, healthy: {x: [0, null]}, columns}]);
}
const svg = all("svg[tabindex]").at(-1), {left, width} = svg.getBoundingClientRect(), W = svg.viewBox.baseVal.width;
svg.onpointermove({clientX: left + width * (W + 44 - 8) / 2 / W}); // the middle of the axis, from 44 to W - 8
seen.middle = texts(".read").at(-1);
svg.onkeydown({key: "Home", preventDefault() {}});
seen.plots = all(".card:has(pre)").map(card => ({title: texts("h3", card)[0], say: texts(".soft", card)[0],
  labels: texts("text", card), read: texts(".read", card)[0], band: values("rect", "y height", card),
  mark: values("line[stroke='var(--ink)']", "x1 x2", card),
  keys: values(".key path", "stroke stroke-dasharray", card),
  lines: values("svg[tabindex] path", "stroke stroke-dasharray d", card),
  numbers: texts("pre", card)[0].split("\\n").map(row => row.split("\\t"))}));
if (policy) {
  all("#episode .chip").at(-1).onclick();
  for (const {value} of prompts.options) {
    set(prompts, value);
    seen.on.push(all("#episode .chip").findIndex(node => node.className === "chip on" && node.tabIndex === 0));
    seen.sums.push(texts("#episode .chips + p")[0]);
  }
  set(policy, "PPO before training");
  seen.facts = texts("#episode dd");
  seen.numbers = texts("#episode .chip small");
  seen.styles = values("#episode .chip", "style");
}
set($("#watch select"), 1);
seen.last = texts("#watch .card");
window.setInterval = tick => tick();
button.onclick(); // at the end: from the start, and one moment on
seen.second = texts("#watch .card");
seen.judged = values("#watch .grid > :last-child .chip", "style").join(" ");
order.splice(0, order.length, ...Array(20).keys());
seen.looks = new Set(order.map(name => JSON.stringify(paint(lookOf(name))))).size;
frameElement.after("SEEN" + btoa(unescape(encodeURIComponent(JSON.stringify(seen)))) + "NEES");
"""


def look(folder, *pages):
    """What LOOK sees in pages of some width, all in one browser. The console must have nothing to say."""
    if not CHROMIUM:
        pytest.skip("no Chromium is installed: apt-get install chromium")
    frames = []
    for width, runs in pages:
        page = page_module.fill(runs).replace("</body>", f"<script>{{{LOOK}}}</script></body>")
        frames.append(f'<iframe width="{width}" srcdoc="{html.escape(page)}"></iframe>')
    (folder / "page.html").write_text("<!doctype html>" + "".join(frames), encoding="utf-8")
    done = subprocess.run([CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
                           "--enable-logging=stderr", f"--user-data-dir={folder / 'profile'}", "--window-size=1400,900",
                           "--virtual-time-budget=4000", "--dump-dom", (folder / "page.html").as_uri()],
                          capture_output=True, text=True, encoding="utf-8", timeout=120)
    assert "CONSOLE" not in done.stderr, done.stderr
    return [json.loads(base64.b64decode(seen)) for seen in re.findall(r"SEEN([\w+/=]+)NEES", done.stdout)]


def points(path):
    """The points of a line, as (x, y)."""
    return [(float(x), float(y)) for x, y in re.findall(r"([\d.]+) ([\d.]+)", path[2])]


@pytest.fixture(scope="module")
def browsed(data, two_runs, tmp_path_factory):
    """[a run, two runs] with some made-up numbers, and what a phone shows of the one and a screen of the others."""
    one, a, b = copy.deepcopy([data, *two_runs[2]])
    one["turns"] = a["turns"] = dict(ppo=1, ppo_no_kl=0)
    one["notes"].append("warning: made up")
    one["curves"]["ppo"]["size"] = 3
    one["frontier"]["trails"]["ppo"] = dict(kl=[0, 1, 2], score=[0, 0, 0], gold=[0, 2, 1])
    one["episodes"]["PPO before training"][-1]["advantages"][0] = -9.0
    one["episodes"]["ppo"][0]["beta"] = 0.75
    one["frontier"]["away"] = ["grpo"]
    one["verdicts"][0]["collapsed"] = True
    b["verdicts"], b["notes"] = one["verdicts"], one["notes"]
    for row in one["watch"]:
        row["score"][1], row["gold"][1] = 1.25, -0.5
    a["report"]["diagnosis"], b["report"]["diagnosis"] = [], ["made up"]
    b["prompts"][1], b["report"]["optimum"], b["report"]["policies"]["sft"]["gold"] = "another prompt", None, None
    a["report"]["config"]["reward_from"] = "task"
    b["watch"].append(dict(b["watch"][-1], when="in the end"))
    return [[one], [a, b]], look(tmp_path_factory.mktemp("browser"), (360, [one]), (1280, [a, b]))


def test_the_page_in_a_browser(browsed):
    """
    Bug: a phone has to scroll to the side; a colour has the other sign; what is shown is of another policy, prompt,
    token or moment; a warning looks like a note.
    """
    one, seen = browsed[0][0][0], browsed[1][0]
    assert list(seen["sections"]) == "about table watch climb frontier episode diagnosis facts".split()
    assert seen["wide"] <= 360 and seen["tables"] == [one["table"]]
    assert seen["warnings"] == [*[card["big"] for card in one["verdicts"] if card["collapsed"]],
                                *[note for note in one["notes"] if note.startswith("warning: ")]]
    watched = [row for row in one["watch"] if row["stage"] == "ppo"]
    for cards, row in ((seen["second"], watched[1]), (seen["last"], watched[-1])):
        assert f" PPO {row['when']}{row['texts'][1]}score+1.25 gold-0.50 " in cards
    t = 99  # the token that was chosen, or the last one
    for e, on, text in zip(one["episodes"]["ppo"], seen["on"], seen["sums"], strict=True):
        t, kl = min(t, len(e["tokens"]) - 1), sum(e["logp"]) - sum(e["ref_logp"])
        numbers = [e["score"], e["beta"], kl, e["score"] - e["beta"] * kl, e["gold"]]
        assert on == t and [float(x) for x in re.findall(r"-?\d+\.\d+", text)] == near(numbers, 0.0051)
        assert ("cut at the cap" in text) != e["finished"]
    e = one["episodes"]["PPO before training"][-1]
    t, keys = min(t, len(e["tokens"]) - 1), "advantages rewards kl_terms values prob entropy logp ref_logp"
    assert seen["facts"][:2] == [str(t), e["tokens"][t]]
    assert list(map(float, seen["facts"][2:])) == near([e[key][t] for key in keys.split()], 0.00051)
    for number, [style], x in zip(seen["numbers"], seen["styles"], e["advantages"], strict=True):
        [(sign, share)] = re.findall(r"(neg|pos)\) (\d+)%", style)
        assert float(number) == near(x, 0.0051) and float(share) == near(100 * abs(x) / 9, 0.51)
        assert sign == ("neg" if x < 0 else "pos")
    assert re.findall(r"(neg|pos)\) (\d+)%", seen["judged"]) == [("pos", "63"), ("neg", "25")]  # of 2
    colours = re.findall(r"--neg: #(..)..(..); --pos: #(..)..(..)", page_module.fill([]))
    assert len(colours) == 2 and all(a < b and c > d for a, b, c, d in colours)  # blue, orange, also when it is dark


def test_the_plots_in_a_browser(browsed):
    """Bug: a line, a mark, an axis, a band, a reading or a metric is missing, shifted or of something else."""
    one, seen, plots = browsed[0][0][0], browsed[1][0], {}
    for plot in seen["plots"]:
        plots.setdefault(plot["title"], plot)
    ppo, plot = one["curves"]["ppo"]["columns"], plots["PPO: score and gold"]
    head, *rows = plot["numbers"]
    assert head == ["iteration", "score", "gold"]
    assert plots["DPO: log-probs"]["numbers"][0] == ["step", "chosen", "rejected"]
    assert [tuple(map(float, row)) for row in rows] == list(zip(ppo["step"], ppo["score"], ppo["gold"]))
    assert plot["labels"][-2:] == ["standard deviations of SFT's", "| gold turns at 1"]
    [mark], (x, _) = plot["mark"], points(plot["lines"][0])[1]
    assert list(map(float, mark)) == near([x, x], 0.051)
    assert plot["say"] == "It is trained on the score. Each number is the mean of 3 iterations. "
    assert "| gold turns at 0" in plots["PPO, no KL: score and gold"]["labels"]
    assert plots["length"]["keys"] == [["var(--c1)", "7 3"], ["var(--c2)", "2 3"], ["var(--c3)", "9 3 2 3"]]
    for title, x in (("objective", "objective"), ("distance from SFT", "kl")):
        assert f"the optimum {one['report']['optimum'][x]:.3g}" in plots[title]["read"]
    assert seen["sections"]["frontier"].count("too far away") == 1
    assert plots["length"]["say"] == "Each number is the mean of 3 or 1 iterations. "
    for title, from_above in (("Objective", [0, 1, 2]), ("Gold", [1, 2, 0])):
        head, *rows = plots[title]["numbers"]
        read = [name + (" " if y == "-" else f" {float(y):.3g}") for name, y in zip(head[1:], rows[-1][1:])]
        assert plots[title]["read"].endswith("".join(read))
        drawn = [row[head.index("PPO")] for row in rows]
        assert [float(y) for y in drawn if y != "-"] == near([one["report"]["policies"]["ppo"][title.lower()]])
        [trail] = [points(line) for line in plots[title]["lines"] if line[:2] == ["var(--c1)", "7 3"]]
        assert sorted(range(3), key=lambda t: trail[t][1]) == from_above
        assert plots[title]["keys"][:2] == [["var(--ink)", ""], ["var(--ink)", "2 3"]]
    smoothed = "Each number is the mean of 2 iterations. The strong line is a moving mean of 25 numbers"
    for n, raised, told in ((150, [75], ""), (151, list(range(63, 88)), smoothed)):  # a peak at step 75
        plot, line = plots[f"made {n}"], plots[f"made {n}"]["lines"][-2]  # the last one is the cursor
        assert plot["say"].split(";")[0] == "Healthy: at least 0. " + told
        assert plot["labels"] == ["0", "10", "20", *["0", "50", "100", "150"][:n - 147], "iteration", ""]
        assert plot["numbers"] == [["iteration", "PPO"], *[[str(t), "25" if t == 75 else "0"] for t in range(n)]]
        assert [t for t, (_, y) in enumerate(points(line)) if y < points(line)[0][1]] == raised
        assert list(map(float, plot["band"][0])) == near([20, 168])  # from the top to 0
    assert [seen["middle"], plots["made 151"]["read"]] == ["iteration 75PPO 25", "iteration 0PPO 0"]
    last = [text for metric in list(one["curves"]["grpo"]["columns"])[1:]
            for text in (metric.replace("_", " "), "iteration\tGRPO")]
    assert seen["metrics"][-len(last) - 1:] == ["GRPO", *last] and seen["metrics"].count("GRPO") == 1
    assert "PPO and PPO, no KL" in seen["metrics"] and seen["looks"] == 20


def test_two_runs_in_a_browser(browsed):
    """Bug: something of the first run is shown for all: its table, prompt, last moment, optimum, turn or diagnosis."""
    (a, b), seen, plots = browsed[0][1], browsed[1][1], {plot["title"]: plot for plot in browsed[1][1]["plots"]}
    about, table, _, _, diagnosis, facts = seen["sections"].values()
    assert seen["wide"] <= 1280 and list(seen["sections"]) == "about table watch climb diagnosis facts".split()
    assert seen["tables"] == [a["table"], b["table"]] and "Optimum is" in table  # one of them has an optimum
    warnings = browsed[1][0]["warnings"]
    assert f"{b['name']}: beta 0.75" in table and seen["warnings"][-len(warnings):] == warnings
    assert f"{a['name']}: nothing unusual{b['name']}: made up" in diagnosis
    for run, prompt, date in ((a, "", "20"), (b, "another prompt", "19")):
        assert f"{run['name']}, date {date}" in about and f"settings of {run['name']}date{date}" in facts
        start = f"{run['name']} PPO {run['watch'][-1]['when']}{prompt}{run['watch'][-1]['texts'][1]}score"
        assert any(card.startswith(start) for card in seen["last"])
    assert seen["middle"] == f"iteration 75{a['name']} 25"  # of a plot that is stretched
    assert plots["DPO: accuracy"]["numbers"][0] == ["step", a["name"], b["name"]]
    plot, looks = plots["PPO: score and gold"], [[f"var(--c{i})", dash] for i in (0, 1) for dash in ("", "7 3")]
    assert [line[:2] for line in plot["lines"][:4]] == plot["keys"] == looks
    assert plot["labels"][-5:] == ["0", "1", "2", "iteration", "the reward; gold in standard deviations"]
    assert not any("the optimum" in plot["read"] or "turns" in " ".join(plot["labels"]) for plot in seen["plots"])
