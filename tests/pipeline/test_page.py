"""
The page of a run: its data, computed a second time without the code of the page, and the page in a real browser.

The tests in a browser skip where no Chromium is installed: apt-get install chromium
"""

import dataclasses
import io
import json
import math
import random
import re
import shutil
import signal
from contextlib import redirect_stdout
from pathlib import Path

import pytest
from browser import CHROMIUM, Browser
from helpers import page_data

import minirlhf
from pipeline import config, progress, stages
from pipeline import page as page_module
from pipeline.config import parse_config
from pipeline.report import format_table
from pipeline.run import Run

ROOT = Path(__file__).parent.parent.parent
SEED = ("--seed", "5")
SHOWN, MOMENTS = 8, [0, 1, 2, 3, 4, 5, 6]  # of the six iterations of the tiny run
SYMBOLS = {code: 0x2400 + code for code in range(32)}  # how the page shows what would move the cursor
HOSTILE = ["</script><script>window.hacked = 1</script>", "<img src=x onerror='window.hacked = 1'>", "<!-- <script>",
           "\0 NUL and \x1b[31m", "\u2028 line \u2029", "\u202e drawkcab", "שלום עולם", "👩‍👩‍👧 and 🇩🇪",
           "\"quotes\" 'and' `${window.hacked = 1}`", "&lt;b&gt; & \\u003c \\", "{DATA}", "a\nline\r\n\tbreak"]


def run_page(folder, *more):
    assert minirlhf.main(["--stages", "page", "--out", str(folder), *more]) == 0


@pytest.fixture(scope="module")
def data(tiny):
    return page_data(tiny)


def spelled(files, token):
    """A token as text, or as the byte that it is where that is only a part of a character."""
    text = files.tokenizer.decode([token])
    return f"\\x{token:02x}" if text == "\ufffd" else text


def near(x, tolerance=2e-4):
    return pytest.approx(x, abs=tolerance)


# ---- the data ------------------------------------------------------------------------------------------------------

def test_the_report_stage_makes_the_page_and_the_stage_page_makes_it_again(tiny, tiny_copy, data):
    """The page cannot be made from a finished run, or says something else than the first time."""
    before = {path.name: path.read_bytes() for path in tiny_copy.iterdir()}
    (tiny_copy / "report.html").unlink()
    run_page(tiny_copy)
    assert page_data(tiny_copy) == dict(data, run="copy")
    after = {path.name: path.read_bytes() for path in tiny_copy.iterdir()}
    del before["report.html"], after["report.html"]
    assert after == before


def test_a_prompt_beside_the_page_is_refused(tiny, capsys):
    """An option without effect is taken in silence."""
    assert minirlhf.main(["--stages", "page", "--prompt", "hello", "--out", str(tiny)]) == 2
    assert "--prompt belongs to the stages sample and trace" in capsys.readouterr().err


def test_numbers_are_those_of_the_report_and_of_the_metrics(files, data):
    """The page shows an older report, or loses rows of the metrics."""
    assert data["report"]["policies"] == {name: {key: near(x, 1e-6) for key, x in row.items()}
                                          for name, row in files.report["policies"].items()}
    rows = [json.loads(line) for line in (files.folder / "metrics.jsonl").read_text().splitlines()]
    for stage in ("pretrain", "sft", "reward", "ppo", "grpo", "dpo"):
        expected = [row for row in rows if row["stage"] == stage and "step" in row]
        assert [row["step"] for row in data["metrics"][stage]] == list(range(len(expected)))
        for row, other in zip(data["metrics"][stage], expected):
            assert row == {key: near(x, 1e-6) if isinstance(x, float) else x for key, x in other.items()}
    assert set(data["turns"]) == {"ppo", "grpo"}
    assert data["notes"].startswith("gold and score in standard deviations")
    assert format_table(files.report).endswith("-\n" + data["notes"])


@pytest.mark.parametrize("name", ["pretrained", "sft", "dpo", "ppo", "grpo"])
def test_an_episode_token_by_token(files, data, name):
    """A number stands at another token, a reference is the policy, or a policy borrows the critic of PPO."""
    beta, tokenizer = files.config["beta"], files.tokenizer
    for i, prompt in list(enumerate(files.heldout()[:SHOWN]))[::3]:
        e = data["episodes"][name][i]
        response = files.sample(name, [prompt], files.config["seed"])[0]
        logp, ref_logp = files.logprobs(name, prompt, response), files.logprobs("sft", prompt, response)
        score, gold = files.scores("reward", prompt + response)[-1], files.gold(prompt, response)
        assert data["prompts"][i] == files.text(prompt)
        assert e["tokens"] == [spelled(files, token) for token in response]
        assert e["states"] == [tokenizer.decode(prompt + response[:t])[-30:] for t in range(len(response))]
        assert e["score"] == near(score) and e["gold"] == near(gold)
        assert e["finished"] == (response[-1] == files.end)
        assert ("values" in e) == ("advantages" in e) == (name == "ppo")
        for t, token in enumerate(response):
            pi, ref = float(logp[t, token]), float(ref_logp[t, token])
            assert [e["logp"][t], e["ref_logp"][t], e["prob"][t]] == near([pi, ref, math.exp(pi)])
            assert e["kl_terms"][t] == near(-beta * (pi - ref))
            assert e["rewards"][t] == near(-beta * (pi - ref) + (score if t == len(response) - 1 else 0))
            assert e["entropy"][t] == near(-sum(math.exp(x) * x for x in logp[t].tolist()))
            for key, x in (("top", logp[t]), ("ref_top", ref_logp[t])):
                best = x.sort(descending=True)
                assert [p for _, p in e[key][t]] == near(best.values[:5].exp().tolist())
                assert e[key][t][0][0] == spelled(files, int(best.indices[0]))


def test_a_preference_pair_at_every_prefix(files, data):
    """A score stands at another token, the pairs that are wrong do not come first, or they are pairs of training."""
    heldout = files.preferences("heldout")
    gaps = [files.scores("reward", row["prompt"] + row["chosen"])[-1]
            - files.scores("reward", row["prompt"] + row["rejected"])[-1] for row in heldout]
    assert data["pairs"]["total"] == len(heldout)
    assert data["pairs"]["wrong"] == sum(gap <= 0 for gap in gaps) > 4
    order = sorted(range(len(heldout)), key=gaps.__getitem__)
    for shown, i in zip(data["pairs"]["rows"], order[:4] + order[:-3:-1], strict=True):
        row = heldout[i]
        assert shown["prompt"] == files.text(row["prompt"])
        assert shown["gold"] == near(row["gold"], 1e-6)
        for side, ids in zip(shown["sides"], (row["chosen"], row["rejected"]), strict=True):
            assert side["tokens"] == [spelled(files, token) for token in ids]
            assert side["scores"] == near(files.scores("reward", row["prompt"] + ids)[len(row["prompt"]):])


def test_a_part_of_a_character_is_shown_as_its_bytes(files):
    """Half an emoji becomes a question mark, or a traceback."""
    shown = [page_module.token_text(files.tokenizer, token) for token in (0xf0, 0x9f, ord("<"))]
    assert shown == ["\\xf0", "\\x9f", "<"]


def test_what_is_not_a_number_becomes_null():
    """NaN reaches the page, whose JSON then cannot be read."""
    mixed = {"a": [math.nan, math.inf, -math.inf, 1 / 3, 7, None, "NaN"], "b": {"c": (True, 1e-9)}}
    assert page_module.clean(mixed) == {"a": [None, None, None, 0.333333, 7, None, "NaN"], "b": {"c": [True, 0.0]}}


# ---- what is stored during training --------------------------------------------------------------------------------

def test_watched_answers_are_those_of_the_policy_at_that_moment(files, data):
    """The answers are those of another moment, of training prompts, of other random numbers, or of another reward."""
    prompts, seed, rows, n = files.heldout()[:SHOWN], files.config["seed"], data["watch"], len(MOMENTS)
    moments = [(stage, step) for stage in ("ppo", "grpo") for step in MOMENTS]
    assert [(row["stage"], row["step"]) for row in rows] == moments
    for row, name in ((rows[0], "sft"), (rows[n - 1], "ppo"), (rows[n], "sft"), (rows[-1], "grpo")):
        responses = files.sample(name, prompts, seed)
        assert row["texts"] == [files.text(response) for response in responses]
        scores = [files.scores("reward", prompt + response)[-1] for prompt, response in zip(prompts, responses)]
        assert row["score"] == near(scores)
        assert row["gold"] == near([files.gold(prompt, response) for prompt, response in zip(prompts, responses)])
    assert rows[0]["texts"] != rows[n - 1]["texts"] != rows[-1]["texts"]


@pytest.mark.parametrize("stage", ["ppo", pytest.param("grpo", marks=pytest.mark.slow)])
def test_watching_changes_nothing_of_the_training(stage, tiny, tiny_copy, monkeypatch):
    """The watcher takes random numbers from the training, or leaves the policy in another state."""
    monkeypatch.setattr(stages, "watcher", lambda *arguments: lambda iterations, policy: None)
    (tiny_copy / "watch.jsonl").unlink()
    for name in ("ppo.pt", "critic.pt", "grpo.pt"):
        (tiny_copy / name).rename(tiny_copy / f"{name}.before")
    assert minirlhf.main(["--stages", stage, "--out", str(tiny_copy)]) == 0
    assert not (tiny_copy / "watch.jsonl").exists()
    made = [path.name for path in tiny_copy.glob("*.pt") if (tiny_copy / f"{path.name}.before").exists()]
    assert sorted(made) == dict(ppo=["critic.pt", "ppo.pt"], grpo=["grpo.pt"])[stage]
    for name in made:
        assert (tiny_copy / name).read_bytes() == (tiny / name).read_bytes()


def rows_of(folder, stage):
    lines = (folder / "watch.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["stage"] == stage]


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["ppo", "grpo"])
def test_a_training_that_goes_on_is_watched_as_if_it_had_not_stopped(stage, tiny, tiny_copy, monkeypatch):
    """After --resume a moment is missing, or its answers are those from before the stop, which training has undone."""
    def stopping(*arguments):
        watch = watcher(*arguments)

        def watch_and_stop(iterations, policy):
            watch(iterations, policy)
            progress.signals.asked = signal.SIGINT if iterations == 3 else None
        return watch_and_stop

    watcher, path, other = stages.watcher, tiny_copy / "watch.jsonl", dict(ppo="grpo", grpo="ppo")[stage]
    old = [{**row, "texts": ["old"]} for row in rows_of(tiny, stage)]  # of an earlier training
    path.write_text("".join(json.dumps(row) + "\n" for row in old + rows_of(tiny, other)))
    monkeypatch.setattr(stages, "watcher", stopping)
    assert minirlhf.main(["--stages", stage, "--out", str(tiny_copy)]) == 130
    rows = rows_of(tiny_copy, stage)
    assert rows == rows_of(tiny, stage)[:4]
    with path.open("a") as file:  # stored after the last checkpoint of a run that was killed
        file.write(json.dumps({**rows[3], "step": 4}) + "\n")
    monkeypatch.setattr(stages, "watcher", watcher)
    assert minirlhf.main(["--resume", "--out", str(tiny_copy)]) == 0
    for name in (stage, other):
        assert rows_of(tiny_copy, name) == rows_of(tiny, name)


def test_a_stage_that_runs_again_replaces_its_own_answers_only(tiny_copy):
    """Old answers stay among the new ones, answers of another stage are lost, or moments before it are."""
    run = Run(parse_config(["--stages", "page", "--out", str(tiny_copy)]))
    policy, reward_model = run.load_network("sft"), run.load_network("reward")
    page_module.watcher(run, "ppo", reward_model)(4, policy)
    run.config = dataclasses.replace(run.config, ppo_iterations=110)
    watch = page_module.watcher(run, "other", reward_model)
    for iterations in range(31):
        watch(iterations, policy)
    rows = [(row["stage"], row["step"]) for row in run.metrics("watch.jsonl")]
    expected = [("ppo", step) for step in range(4)] + [("grpo", step) for step in MOMENTS] + [("ppo", 4)]
    assert rows == expected + [("other", step) for step in (0, 10, 20, 30)]


# ---- the files -----------------------------------------------------------------------------------------------------

def test_the_page_is_read_in_one_sitting():
    """The page grows until nobody reads it, or needs something from elsewhere."""
    html, code = [(ROOT / "pipeline" / name).read_text(encoding="utf-8") for name in ("page.html", "page.py")]
    assert len(html.splitlines()) + len(code.splitlines()) <= 450
    assert max(map(len, html.splitlines())) <= 140
    assert html.count("{DATA}") == 1
    assert re.findall(r"https?://[^\"`$]*", html) == ["http://www.w3.org/"]  # the name of SVG, which nothing loads


def luminance(colour):
    """The relative luminance of #rgb or #rrggbb, as the guidelines for accessible pages (WCAG 2) define it."""
    digits = colour if len(colour) == 6 else "".join(2 * digit for digit in colour)
    channels = [int(digits[i:i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear))


@pytest.mark.parametrize("scheme", [0, 1])
def test_every_text_stands_out_from_its_background(scheme):
    """A number on a coloured token, a label of a plot or a remark is too pale to be read, in light or in dark."""
    html = (ROOT / "pipeline" / "page.html").read_text(encoding="utf-8")
    colours = dict(re.findall(r"--(\w+): #(\w+);", re.findall(r":root \{(.*?)\}", html, re.S)[scheme]))
    pairs = [("ink", name) for name in ("bg", "card", "pos", "neg", "seq")] + [("soft", "bg"), ("soft", "card")]
    pairs += [(f"c{i}", "card") for i in range(5)]
    for text, background in pairs:
        darker, lighter = sorted(luminance(colours[name]) for name in (text, background))
        assert (lighter + 0.05) / (darker + 0.05) >= 4.5, (text, background)


def test_the_page_of_the_default_run_is_small():
    """The page in docs/ cannot be mailed, or its picture slows the README."""
    assert 100_000 < (ROOT / "docs" / "page.html").stat().st_size < 2_000_000
    if (ROOT / "docs" / "page.png").exists():  # the planted bugs are tried in copies without pictures
        assert (ROOT / "docs" / "page.png").stat().st_size < 300_000


# ---- in a browser --------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def tab():
    if not CHROMIUM:
        pytest.skip("no Chromium is installed: apt-get install chromium")
    browser = Browser()
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def talkative(tiny, tmp_path_factory):
    """The tiny run with the page of another seed: with its own, every answer ends at once."""
    folder = shutil.copytree(tiny, tmp_path_factory.mktemp("talkative") / "run")
    run_page(folder, *SEED)
    return folder


@pytest.fixture
def opened(tab, talkative):
    """A page, freshly loaded. At the end there is no error on the console."""
    tab.open(talkative / "report.html")
    yield tab
    assert tab.errors == []


def texts(tab, selector):
    return tab.run(f"[...document.querySelectorAll({json.dumps(selector)})].map(node => node.textContent)")


SECTIONS = ["table", "climb", "frontier", "watch", "episode", "pairs"]


def sections(tab):
    return tab.run("[...document.querySelectorAll('section')].map(node => node.id)")


@pytest.mark.parametrize("width, dark", [(1280, False), (1280, True), (360, False), (360, True)])
def test_everything_is_drawn_and_fits(tab, tiny, width, dark):
    """A plot stays empty, the console complains, or a phone has to scroll to the side."""
    tab.open(tiny / "report.html", width=width, dark=dark)
    assert tab.errors == [] and sections(tab) == SECTIONS
    marks = tab.run("[...document.querySelectorAll('svg')].map(svg => "
                    "[...svg.querySelectorAll('.mark')].map(mark => mark.getBBox().width))")
    assert len(marks) == 12 + 2 + 6 and all(widths and max(widths) > 20 for widths in marks)
    assert tab.run("document.documentElement.scrollWidth") <= width
    assert "NaN" not in tab.run("[...document.querySelectorAll('svg')].map(svg => svg.outerHTML).join()")
    light = tab.run("getComputedStyle(document.body).backgroundColor").count("255")
    assert (light == 0) == dark


def test_the_table_is_the_report(opened, files):
    """A column of the page's table is another one, or a bar has the length of something else."""
    rows = opened.run("[...document.querySelectorAll('#table table tr')].slice(1).map(row => "
                      "[...row.children].map(cell => cell.textContent))")
    bars = opened.run("[...document.querySelectorAll('#table table i')].map(i => parseFloat(i.style.width))")
    labels = dict(pretrained="pretrained", sft="SFT", best_of_n="best of 4", dpo="DPO", ppo="PPO", grpo="GRPO")
    lines, best, beta = list(files.report["policies"].items()), files.report["optimum"], files.config["beta"]
    lines.append(("optimum", dict(best, score=best["objective"] + beta * best["kl"], optimum_share=1)))
    for cells, (name, r) in zip(rows, lines, strict=True):
        assert cells[0] == labels.get(name, "the optimum")
        for cell, key in zip(cells[1:], "optimum_share - gold score kl objective win_rate length finished".split()):
            if key == "-":
                continue
            if key not in r:
                assert cell == "-"
                continue
            parts = re.fullmatch(r"(-?\d+(\.\d+)?)(%?)( ±(\d\.\d\d))?", cell)
            unit = 0.01 if parts[3] else 1
            digits = len(parts[2] or ".") - 1
            assert digits == (0 if parts[3] else 1 if key == "length" else 2)
            assert float(parts[1]) * unit == pytest.approx(r[key], abs=0.5001 * unit / 10 ** digits)  # rounded
            error = r.get(f"{key}_se") or 0
            assert float(parts[5] or 0) == pytest.approx(error, abs=0.005001) and bool(parts[5]) == bool(error)
    shares = [row["optimum_share"] for row in files.report["policies"].values()] + [1]
    assert bars == pytest.approx([100 * min(1, max(0, share)) for share in shares], abs=0.01)


def test_the_plots_show_the_metrics_and_the_frontier(opened, files):
    """A curve is another metric, smoothed where it is short, or at other steps; best-of-n is missing."""
    rows = [json.loads(line) for line in (files.folder / "metrics.jsonl").read_text().splitlines()]
    ppo = [row for row in rows if row["stage"] == "ppo" and "step" in row]
    numbers = texts(opened, "#climb .card:first-child td")
    expected = [cell for key in ("score", "gold", "objective") for row in ppo
                for cell in (key, str(row["step"]), f"{row[key]:.3f}")]
    assert numbers == expected
    curve = files.report["frontier"]
    objective = [row["score"] - files.config["beta"] * row["kl"] for row in curve["best_of_n"]]
    cells = texts(opened, "#frontier .card:first-child td")
    best = [cells[i + 2] for i in range(0, len(cells), 3) if cells[i] == "best of 1 to 4"]
    assert best == [f"{x:.3f}" for x in objective] and len(best) == 3


def test_a_plot_is_read_with_the_pointer_and_with_the_keys(opened, files):
    """The reading under a plot is that of another step."""
    opened.point("#climb svg")
    read = texts(opened, "#climb .read")[0]
    assert re.match(r"iteration [23]: score -?\d", read)
    opened.run("document.querySelector('#climb svg').focus()")
    opened.press("End")
    last = [json.loads(line) for line in (files.folder / "metrics.jsonl").read_text().splitlines()]
    last = [row for row in last if row["stage"] == "ppo" and "step" in row][-1]
    assert texts(opened, "#climb .read")[0] == \
        f"iteration 5: score {last['score']:.2f}, gold {last['gold']:.2f}, objective {last['objective']:.2f}"
    opened.press("ArrowLeft")
    assert texts(opened, "#climb .read")[0].startswith("iteration 4: ")


def test_the_slider_changes_the_answers(opened, data):
    """The slider moves and the answers stay, or they are those of another moment or of the other training."""
    last = len(MOMENTS) - 1
    for stage, i in (("ppo", last), ("ppo", 0), ("ppo", 3), ("grpo", 3), ("grpo", last)):
        opened.run(f"(() => {{ const pick = document.querySelector('#watch select'); pick.value = '{stage}';"
                   f"pick.dispatchEvent(new Event('change')); const s = document.querySelector('#watch input');"
                   f"s.value = {i}; s.dispatchEvent(new Event('input')); }})()")
        row = [row for row in data["watch"] if row["stage"] == stage][i]
        answers = [text.strip().translate(SYMBOLS) for text in row["texts"]]
        assert texts(opened, "#watch p.text") == [answer or "(no words)" for answer in answers]
        output = texts(opened, "#watch output")[0]
        assert output.startswith(stage.upper() + (f" after iteration {i}: " if i else " before training: "))
        assert f"score {sum(row['score']) / SHOWN:+.2f}, gold {sum(row['gold']) / SHOWN:+.2f}" in output
        assert texts(opened, "#watch small") == [f"{x:+.2f}" for pair in zip(row["score"], row["gold"]) for x in pair]
    opened.run("document.querySelector('#watch input').focus()")
    opened.press("ArrowLeft")
    assert f"GRPO after iteration {last - 1}" in texts(opened, "#watch output")[0]


def longest(data):
    """The prompt to which PPO gave the longest answer."""
    return max(range(SHOWN), key=lambda i: len(data["episodes"]["ppo"][i]["tokens"]))


def choose(tab, name, value):
    tab.run(f"(() => {{ const s = document.querySelector('#episode [name={name}]'); s.value = {json.dumps(value)};"
            "s.dispatchEvent(new Event('change')); })()")


def test_tokens_are_coloured_by_what_is_picked(opened, talkative):
    """Another quantity is picked and the colours stay, or a colour has the wrong sign or another token's strength."""
    data = page_data(talkative)
    seen, i = set(), longest(data)
    choose(opened, "prompt", str(i))
    for key, symbol in (("advantages", "pos"), ("kl_terms", "pos"), ("values", "pos"), ("entropy", "seq")):
        choose(opened, "colour", key)
        values = data["episodes"]["ppo"][i][key]
        styles = opened.run("[...document.querySelectorAll('#episode .chip')].map(node => node.getAttribute('style'))")
        colours = opened.run("[...document.querySelectorAll('#episode .chip')].map("
                             "node => getComputedStyle(node).backgroundColor)")
        most = max(map(abs, values))
        for value, style in zip(values, styles, strict=True):
            name, percent = re.search(r"var\(--(\w+)\) (\d+)%", style).groups()
            assert name == (symbol if value >= 0 else "neg")
            assert float(percent) == pytest.approx(100 * abs(value) / most, abs=0.51)
        assert texts(opened, "#episode .chip small") == [f"{value:.2f}" for value in values]
        seen.add(tuple(colours))
        assert len(set(colours)) > 1
    assert len(seen) == 4


def test_a_token_shows_the_row_of_the_trace(opened, talkative):
    """The numbers under the pointer are those of another token, or of another episode than the one that is printed."""
    data = page_data(talkative)
    i = longest(data)
    prompt = data["prompts"][i]
    choose(opened, "prompt", str(i))
    with redirect_stdout(io.StringIO()) as out:
        assert minirlhf.main(["--stages", "trace", "--prompt", prompt, "--out", str(talkative), *SEED]) == 0
    traced = [line for line in out.getvalue().splitlines() if re.match(r" *\d+  ['\"]", line)]
    assert len(traced) == len(texts(opened, "#episode .chip")) > 3
    for t in (0, len(traced) // 2, len(traced) - 1):
        opened.point("#episode .chip", t)
        facts = dict(zip(texts(opened, "#episode dt"), texts(opened, "#episode dd")))
        names = ("log pi", "log ref", "KL term", "reward", "value", "advantage")
        assert [float(facts[name]) for name in names] == near([float(x) for x in traced[t].split()[-6:]], 1.1e-3)
        assert facts["t"] == traced[t].split()[0] and repr(facts["state (its end)"]) in traced[t]
        episode = data["episodes"]["ppo"][i]
        shown = texts(opened, "#episode .next span:not(.bar)")
        assert [x for x in shown if x.endswith("%")] == \
            [f"{100 * p:.1f}%" for key in ("top", "ref_top") for _, p in episode[key][t]]
    printed = re.search(r"add up to .* = (\S+) - (\S+) \* (\S+) = (\S+); gold (-?\d\.\d\d)", out.getvalue())
    numbers = re.findall(r"-?\d+\.?\d*", texts(opened, "#episode .sum")[0])
    assert [float(x) for x in numbers[:5]] == near([float(x) for x in printed.groups()], 0.0011)


def test_tokens_are_walked_along_with_the_arrow_keys(opened, talkative):
    """A reader without a mouse cannot look at the tokens, or does not see where he is."""
    data = page_data(talkative)
    i = longest(data)
    choose(opened, "prompt", str(i))
    opened.run("document.querySelector('#episode .chip').focus()")
    for key, t in (("ArrowRight", 1), ("ArrowRight", 2), ("ArrowLeft", 1), ("End", -1), ("Home", 0)):
        opened.press(key)
        t %= len(data["episodes"]["ppo"][i]["tokens"])
        assert texts(opened, "#episode dd")[0] == str(t)
        assert opened.run("[...document.activeElement.parentNode.children].indexOf(document.activeElement)") == t
        assert opened.run("getComputedStyle(document.activeElement).outlineStyle") == "solid"


def test_a_policy_without_a_critic_has_no_advantages(opened, talkative):
    """SFT or GRPO is shown with the values of PPO's critic, or choosing it ends in an error."""
    for name in ("sft", "grpo"):
        choose(opened, "policy", name)
        assert texts(opened, "#episode [name=colour] option") == ["KL term", "reward", "probability", "entropy"]
        assert len(texts(opened, "#episode .chip")) == len(page_data(talkative)["episodes"][name][0]["tokens"])
        assert "value" not in texts(opened, "#episode dt")


def test_the_code_behind_the_numbers_is_there(opened):
    """A link to the code of a number leads to another function, or to none."""
    details = "section > .row details "
    for summary, code in zip(texts(opened, details + "summary"), texts(opened, details + "pre"), strict=True):
        module, name = summary.split(".py: ")
        assert f"\ndef {name}(" in "\n" + code
        assert code in (ROOT / f"{module}.py").read_text(encoding="utf-8")


def test_a_turning_point_and_warnings_are_told_and_what_is_not_known_is_absent(tab, tiny_copy):
    """The page is silent where the reward model is exploited or the table warns, or stumbles over a missing number."""
    path = tiny_copy / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        if row["stage"] == "ppo" and "step" in row:
            row.update(score=float(row["step"]), gold=1.0 - abs(row["step"] - 2), length=math.nan)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = json.loads((tiny_copy / "report.json").read_text())
    del report["frontier"]  # as versions before it did not have it
    report["warnings"] = ["a coin <b>", "far away -"]
    report["config"]["reward_from"] = "gold"
    report["policies"]["ppo"]["optimum_share"] = None
    (tiny_copy / "report.json").write_text(json.dumps(report))
    run_page(tiny_copy)
    tab.open(tiny_copy / "report.html")
    assert "Gold turns at iteration 2 while the score still climbs" in texts(tab, "#climb .card:first-child .soft")[0]
    assert "gold turns" in texts(tab, "#climb .card:first-child svg text")
    assert "frontier" not in sections(tab) and "PPO: length" not in texts(tab, "h3")
    assert texts(tab, "#table strong") == [f"warning: {warning}" for warning in report["warnings"]]
    notes = format_table(report).split("-" * 93 + "\n")[-1].splitlines()
    assert texts(tab, "#table .soft.text") == notes and len(notes) > 3
    dpo, ppo, _ = texts(tab, "#head .card")
    score = report["policies"]["ppo"]["score"]
    assert "% of the best possible gain" in dpo.replace("%", "% ") and ppo.startswith(f"PPO{score:.2f}mean score")
    assert "Score is gold, the true reward itself. KL is" in tab.run("document.body.innerText")
    assert tab.errors == []


@pytest.mark.slow
def test_a_stage_that_did_not_run_is_absent(tab, tiny_copy, tmp_path):
    """Without PPO, DPO and beta the page has empty parts or does not load."""
    for name in ("ppo.pt", "critic.pt", "grpo.pt", "dpo.pt", "watch.jsonl"):
        (tiny_copy / name).unlink()
    path = tiny_copy / "metrics.jsonl"
    kept = [line for line in path.read_text().splitlines() if not re.search('"stage": "(ppo|grpo|dpo)"', line)]
    path.write_text("\n".join(kept) + "\n")
    settings = {**json.loads((tiny_copy / "config.json").read_text()), "beta": 0.0}
    (tiny_copy / "config.json").write_text(json.dumps(settings))
    assert minirlhf.main(["--stages", "report", "--out", str(tiny_copy)]) == 0
    tab.open(tiny_copy / "report.html")
    assert tab.errors == [] and sections(tab) == ["table", "climb", "episode", "pairs"]
    assert texts(tab, "#episode [name=policy] option") == ["pretrained", "SFT"]
    assert texts(tab, "#climb h3") == ["reward model: accuracy"]
    body = tab.run("document.body.innerText")
    assert not re.search("(PPO|GRPO|DPO):", body) and "the optimum" not in body


def make_hostile(folder):
    """A run on a file of texts that want to be something else than text."""
    rng = random.Random(0)
    lines = []
    for i in range(240):
        prompt, chosen, rejected = (" ".join(rng.sample(HOSTILE, 2)) for _ in range(3))
        lines.append(json.dumps(dict(prompt=f"{i % 60} {prompt}", chosen=chosen, rejected=rejected + " no")))
    path = folder.parent / "hostile.jsonl"
    path.write_text("\n".join(lines))
    small = dict(n_layer=1, n_head=2, n_embd=32, pretrain_steps=8, sft_steps=8, ppo_iterations=2, ppo_batch=32,
                 minibatch=16, eval_prompts=16, best_of=4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(config, "QUICK", small)
        assert minirlhf.main(["--quick", "--data", str(path), "--out", str(folder)]) == 0


@pytest.mark.slow
def test_hostile_texts_are_shown_as_texts(tab, shared, tmp_path):
    """A user's text becomes a part of the page, or ends it; or a page without an oracle speaks of gold."""
    folder = shutil.copytree(shared("hostile", make_hostile), tmp_path / "copy")
    rows = [json.loads(line) for line in (folder / "watch.jsonl").read_text().splitlines()]
    for i, text in enumerate([*HOSTILE, "\ud800 alone"][-8:]):
        rows[-1]["texts"][i] = text
    rows[-1]["texts"][0] = "".join(HOSTILE)
    (folder / "watch.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run_page(folder)
    tab.open(folder / "report.html")
    assert tab.errors == [] and sections(tab) == SECTIONS
    assert tab.run("window.hacked") is None
    assert tab.run("document.querySelectorAll('img, body script').length") == 2  # the data and the code
    assert texts(tab, "#watch p.text")[0] == "".join(HOSTILE).translate(SYMBOLS)
    prompts = texts(tab, "#episode [name=prompt] option")
    assert len(prompts) == SHOWN and all(re.search(r"\d", prompt) for prompt in prompts)
    assert "gold" not in tab.run("document.body.innerText").lower()
    for name in ("pretrained", "sft", "dpo", "ppo"):
        for i in range(SHOWN):
            choose(tab, "policy", name)
            choose(tab, "prompt", str(i))
    assert tab.errors == [] and tab.run("window.hacked") is None
    tab.open(folder / "report.html", width=360)
    assert tab.run("document.documentElement.scrollWidth") <= 360
