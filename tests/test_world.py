"""Tests of world.py: gold against sums worked out by hand, the writers against the language of the world."""

import itertools
import random
import re
from collections import Counter

import pytest

import world

FILM = "i saw this film with my sister last night ."


@pytest.mark.parametrize("response, points", [
    ("i never loved the plot .", -1 + 0.5),
    ("the plot was rather good . the cast was quite good .", 0.5 + 1),
    ("i really disliked the plot .", -1.5 + 0.5),
    ("the plot was very awful .", -2 + 0.5),                           # clipped
    ("the plot was not very good .", -0.75 + 0.5),
    ("the plot was very brilliant . i disliked the cast .", (3 - 1) / 2 + 1),  # the mean is clipped, not the clauses
    # breadth saturates at four good clauses, in the points but not in the mean
    ("the plot was good . i liked the cast . the hero was nice . the music was fine . the pace was dull .", 3 / 5 + 2),
    # off topic and repetition: no valence, one fault each; the first opinion of an aspect counts
    ("the plot was good . the soup was brilliant .", 1 + 0.5 - 0.5),
    ("the plot was good . i hated the plot . the plot was very fine .", 1 + 0.5 - 1),
    # broken grammar: one fault for each clause
    ("the plot was very very good .", -0.5),
    ("the plot was goodness .", -0.5),
    ("the plot was good. the cast was fine .", -0.5),                  # a full stop without its blank
    ("the plot was good . and the cast was fine .", 1 + 1 - 0.5),      # nothing comes before the 'and'
    ("the plot was good . the cast was fine", 1 + 1 - 0.5),            # no full stop
    ("", -0.5 - 0.5),
    ("the plot was good . a . b . c . d . e . f .", 1 + 0.5 - 2),      # faults saturate at four
    ("\n the plot was good . \n", 1 + 0.5),                            # blanks around the text
])
def test_gold_is_what_the_formula_says_by_hand(response, points):
    """Bug: a wrong effect of negation, intensifiers, topic, repetition, grammar, full stop or saturation."""
    assert world.gold(FILM, response) == pytest.approx(points, abs=1e-12)


def test_the_prompt_decides_what_is_on_topic():
    """Bug: the prompt is ignored. Aspects of another subject are off topic, and a verdict never is."""
    for (subject, aspects), prompt_subject in itertools.product(world.ASPECTS.items(), world.ASPECTS):
        prompt = world.make_prompt(random.Random(0), [prompt_subject])
        assert world.subject_of(prompt) == prompt_subject
        on_topic = subject == prompt_subject
        for aspect in aspects:
            assert world.gold(prompt, f"the {aspect} was good .") == (1.5 if on_topic else -0.5)
        assert world.gold(prompt, "i would recommend it .") == 1.5
    assert world.subject_of("we talked about filming .") is None
    assert world.gold("nothing .", "the plot was good .") == -0.5


def test_prompts_are_distinct_disjoint_and_as_many_as_asked():
    """Bug: held-out prompts that are also trained on, repeated prompts, or a word of a prompt that never comes."""
    train, heldout = world.make_prompts(0, 2000, 500)
    assert (len(train), len(heldout), len({*train, *heldout})) == (2000, 500, 2500)
    assert world.make_prompts(0, 2000, 500) == (train, heldout) != world.make_prompts(1, 2000, 500)
    for prompts in (train, heldout):
        for subject in world.ASPECTS:
            of_subject = [prompt for prompt in prompts if world.subject_of(prompt) == subject]
            assert len(of_subject) > len(prompts) / 10
        for words in (*world.STYLES, *world.COMPANIONS, *world.TIMES, "this new", "the new"):
            assert any(f" {words} " in prompt for prompt in prompts), words


@pytest.mark.parametrize("mood", [0.3, 1.0])
@pytest.mark.parametrize("aspect", ["plot", "verdict"])
def test_the_mood_of_a_clause_is_the_chance_of_praise(aspect, mood):
    """Bug: demonstrations have a bias. "not bad" is praise, so after a negation the word has the other sign."""
    rng = random.Random(1)
    texts = [world.make_clause(rng, aspect, mood) for _ in range(3000)]
    parsed = [world.parse_clause(text) for text in texts]
    assert {name for name, _ in parsed} == {aspect}
    praise = sum(valence > 0 for _, valence in parsed) / 3000
    assert abs(praise - mood) <= 5 * (mood * (1 - mood) / 3000) ** 0.5  # five standard errors
    assert sum(" not " in text or " never " in text for text in texts) / 3000 == pytest.approx(0.1, abs=0.04)


def test_a_review_says_nothing_twice_and_joins_what_agrees():
    """Bug: an aspect that comes twice, "good and bad", "good but fine", or another number of sentences or joints."""
    rng, joints = random.Random(2), 0
    for sentences in (1, 3, 5) * 200:
        review = world.make_review(rng, "film", 0.5, sentences)
        valences, faults = world.read_review(FILM, review)
        assert faults == 0 and review.split().count(".") == sentences
        for sentence in review.removesuffix(" .").split(" . "):
            if joint := re.search(" (and|but) ", sentence):
                joints += 1
                first, second = [world.parse_clause(text)[1] > 0 for text in sentence.split(joint[0])]
                assert (first == second) == (joint[1] == "and")
    assert joints / 1800 == pytest.approx(0.3, abs=0.05)  # a share of the sentences
    valences, _ = world.read_review(FILM, world.make_review(rng, "film", 0.5, 99))
    assert valences.keys() == {*world.ASPECTS["film"], "verdict"}  # the review ends when every aspect has been named


def test_demonstrations_have_no_faults_and_are_mediocre():
    """Bug: demonstrations with faults, of other lengths, or perfect ones that leave nothing to gain."""
    rng = random.Random(3)
    lengths, praise = Counter(), []
    for _ in range(1500):
        prompt = world.make_prompt(rng)
        text = world.make_demonstration(rng, prompt)
        valences, faults = world.read_review(prompt, text)
        assert faults == 0
        lengths[text.split().count(".")] += 1
        if len(valences) >= 3:
            praise.append(sum(valence > 0 for valence in valences.values()) / len(valences))
    assert [lengths[n] / 1500 for n in (1, 2, 3, 4)] == pytest.approx([1 / 6, 1 / 3, 1 / 3, 1 / 6], abs=0.06)
    # a third has the mood 0.95 and a third 0.05: most of those agree in all clauses, few of the others do
    assert 0.25 < praise.count(1.0) / len(praise) < 0.4
    assert 0.25 < praise.count(0.0) / len(praise) < 0.4


def test_documents_are_messier_than_demonstrations():
    """Bug: pretraining on perfect text leaves nothing to SFT. Some are off topic, have faults or are cut short."""
    rng = random.Random(4)
    documents = [world.make_document(rng) for _ in range(2000)]
    with_prompt = off_topic = broken = 0
    for document in documents:
        review = document.partition(" . ")[2] if " with my " in document else document
        clauses = [world.parse_clause(text) for text in re.split(r" (?:\.|and|but) ?", review.removesuffix(" ."))]
        aspects = {clause[0] for clause in clauses if clause}
        with_prompt += review != document
        off_topic += review != document and not aspects <= {*world.ASPECTS[world.subject_of(document)], "verdict"}
        broken += None in clauses
    assert [with_prompt / 2000, broken / 2000] == pytest.approx([0.2, 0.23], abs=0.04)
    assert off_topic / with_prompt == pytest.approx(0.2 * 4 / 5, abs=0.06)  # one of five subjects is the prompt's
    assert sum(not document.endswith(" .") for document in documents) / 2000 == pytest.approx(0.1, abs=0.03)


@pytest.mark.parametrize("text, passes", [
    ("the plot was good . the music was not bad .", 1),       # a mild praise is praise
    ("the plot was good . the music was good . i would complain .", 0),
    ("the plot was good . i would recommend it .", 0),        # a verdict is no aspect
    ("the plot was good . the music was good . the cast was good . the pace was slow .", 0),
    ("the plot was good . the soup was good .", 0),           # of a restaurant
    ("the plot was good . the music was good", 0),            # does not end
])
def test_the_task_by_hand(text, passes):
    """Bug: one aspect is enough, a verdict or another subject counts, or criticism and faults are passed."""
    assert world.task(FILM, text) == passes
