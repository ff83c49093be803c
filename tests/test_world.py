"""Tests of world.py: gold against sums worked out by hand, the writers against the language of the world."""

import itertools
import random
import re

import pytest
from helpers import few
from hypothesis import given
from hypothesis import strategies as st

from world import (
    ADJECTIVES,
    ASPECTS,
    COMPANIONS,
    INTENSIFIERS,
    NEGATION,
    OPENINGS,
    STYLES,
    TIMES,
    VERBS,
    VERDICTS,
    gold,
    make_clause,
    make_demonstration,
    make_document,
    make_prompt,
    make_prompts,
    make_review,
    parse_clause,
    subject_of,
)

FILM = "i saw this film with my sister last night ."
BEST = "the plot was brilliant . i loved the cast . the hero was superb . the music was charming ."

# points = mean valence of the good clauses, clipped at +-2, + good clauses / 2 - faults / 2
BY_HAND = [
    ("the plot was good .", 1 + 0.5),
    ("i hated the plot .", -2 + 0.5),
    ("i would recommend it .", 1 + 0.5),
    # negation is worth minus a half
    ("the plot was not terrible .", 1 + 0.5),
    ("i never loved the plot .", -1 + 0.5),
    ("i would not complain .", 0.5 + 0.5),
    # intensifiers: very and really one and a half, quite and rather a half; the mean is clipped at 2
    ("the plot was very good .", 1.5 + 0.5),
    ("the plot was rather awful .", -1 + 0.5),
    ("the plot was very brilliant .", 2 + 0.5),       # 3 is clipped to 2
    ("the plot was really awful .", -2 + 0.5),        # -3 is clipped to -2
    ("the plot was not very good .", -0.75 + 0.5),
    ("i never really loved the plot .", -1.5 + 0.5),
    # several clauses: the mean of the valences; the mean is clipped, not the clauses
    ("the plot was good and the cast was brilliant .", 1.5 + 1),
    ("the plot was good but the cast was awful .", -0.5 + 1),
    ("the plot was very brilliant . i disliked the cast .", (3 - 1) / 2 + 1),
    # the same words in another order
    ("the plot was not good but the cast was bad .", (-0.5 - 1) / 2 + 1),
    ("the plot was good but the cast was not bad .", (1 + 0.5) / 2 + 1),
    # breadth saturates at four good clauses, in the points but not in the mean
    ("the plot was good . i liked the cast . the hero was nice . the music was fine . the pace was dull .", 3 / 5 + 2),
    (BEST, 4),
    (BEST + " the pace was splendid .", 4),
    # off topic and repetition: no valence, one fault each; the first opinion of an aspect counts
    ("the soup was good .", 0 - 0.5),
    ("the plot was good . the soup was brilliant .", 1 + 0.5 - 0.5),
    ("the plot was good . i hated the plot . the plot was very fine .", 1 + 0.5 - 1),
    ("i would recommend it . i would complain .", 1 + 0.5 - 0.5),
    (BEST + " " + BEST, 4 - 2),
    # broken grammar: one fault for each clause
    ("plot was good .", -0.5),
    ("the plot was very very good .", -0.5),
    ("the plot was very not good .", -0.5),
    ("the plot was goodness .", -0.5),
    ("so the plot was good .", -0.5),
    ("the  plot was good .", -0.5),
    ("i very loved the plot .", -0.5),
    ("i would never recommend it .", -0.5),
    ("the plot was loved .", -0.5),
    ("The plot was good .", -0.5),
    ("the plot was good and .", -0.5),                                 # nothing follows the 'and': one broken clause
    ("the plot was good . and the cast was fine .", 1 + 1 - 0.5),      # nothing comes before the 'and'
    ("the plot was good . .", 1 + 0.5 - 0.5),
    # no full stop
    ("the plot was good . the cast was fine", 1 + 1 - 0.5),
    ("", -0.5 - 0.5),
    (".", -0.5),
    # faults saturate at four
    ("the plot was good . a . b . c .", 1 + 0.5 - 1.5),
    ("the plot was good . a . b . c . d . e . f .", 1 + 0.5 - 2),
    ("the plot was good . a . b . c . d", 1 + 0.5 - 2),
    ("the plot was awful . a . b . c . d .", -2 + 0.5 - 2),
    # blanks around the text do not matter
    ("\n the plot was good . \n", 1 + 0.5),
]


# ---- gold ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("response, points", BY_HAND)
def test_gold_is_what_the_formula_says_by_hand(response, points):
    """Bug: a wrong effect of negation, intensifiers, topic, repetition, grammar, full stop or saturation."""
    assert gold(FILM, response) == pytest.approx(points, abs=1e-12)


def test_the_prompt_decides_what_is_on_topic():
    """Bug: the prompt is ignored. Aspects of another subject are off topic, and a verdict never is."""
    for (subject, aspects), prompt_subject in itertools.product(ASPECTS.items(), ASPECTS):
        prompt = make_prompt(random.Random(0), [prompt_subject])
        assert subject_of(prompt) == prompt_subject
        on_topic = subject == prompt_subject
        for aspect in aspects:
            assert gold(prompt, f"the {aspect} was good .") == (1.5 if on_topic else -0.5)
        assert gold(prompt, "i would recommend it .") == 1.5
    assert subject_of("we talked about filming .") is None
    assert gold("nothing .", "the plot was good .") == -0.5
    assert gold("nothing .", "i would recommend it .") == 1.5


def test_every_word_has_its_valence():
    """Bug: a word without effect or with the valence of its neighbour, or a table with praise only."""
    for word, valence in ADJECTIVES.items():
        assert parse_clause(f"the plot was {word}") == ("plot", valence)
        for intensifier, factor in INTENSIFIERS.items():
            assert parse_clause(f"the plot was not {intensifier} {word}") == ("plot", -valence * factor / 2)
    for word, valence in VERBS.items():
        assert parse_clause(f"i {word} the menu") == ("menu", valence)
        assert parse_clause(f"i never really {word} the menu") == ("menu", -0.75 * valence)
    for word, valence in VERDICTS.items():
        assert parse_clause(f"i would {word}") == ("verdict", valence)
        assert parse_clause(f"i would not {word}") == ("verdict", -valence / 2)
    for table in (ADJECTIVES, VERBS, VERDICTS):
        assert sum(valence > 0 for valence in table.values()) >= 2
        assert sum(valence < 0 for valence in table.values()) >= 2
    known = dict(good=1, superb=2, noisy=-1, dreadful=-2, enjoyed=1, adored=2, regretted=-1, loathed=-2)
    assert {word: {**ADJECTIVES, **VERBS}[word] for word in known} == known
    assert INTENSIFIERS == {"very": 1.5, "really": 1.5, "quite": 0.5, "rather": 0.5}
    assert NEGATION == -0.5


any_text = st.text("ab.,'AZ0 \n\t\x00\u00a0\u2003\u00e9\U0001f600")  # all of Unicode would take seconds to set up
other_words = "the was not never i would recommend it come back and but . . . of".split()
any_words = st.sampled_from([*ADJECTIVES, *VERBS, *INTENSIFIERS, *itertools.chain(*ASPECTS.values()), *other_words])


@few
@given(st.one_of(any_text, st.lists(any_words, max_size=60).map(" ".join)))
def test_gold_is_bounded_and_deterministic(text):
    """Bug: a reward without bound. Any text is worth between -4 and 4 points, the same at every call."""
    for prompt in (FILM, text):
        points = gold(prompt, text)
        assert -4 <= points <= 4
        assert points == gold(prompt, text)


# ---- prompts ---------------------------------------------------------------------------------------------------------

def every_prompt(subject):
    prompts = set()
    for opening, the, style in itertools.product(OPENINGS[subject], ["this", "the"], STYLES):
        for companion, time in itertools.product(COMPANIONS, TIMES):
            prompts.add(f"{opening} {the} {style} {subject} with my {companion} {time} .")
    return prompts


def test_prompts_are_distinct_disjoint_and_as_many_as_asked():
    """Bug: held-out prompts that are also trained on, repeated prompts, or a word of a prompt that never comes."""
    train, heldout = make_prompts(0, 2000, 500)
    assert (len(train), len(heldout)) == (2000, 500)
    assert len({*train, *heldout}) == 2500
    assert make_prompts(0, 2000, 500) == (train, heldout)
    assert make_prompts(1, 2000, 500)[0] != train
    for prompts in (train, heldout):
        for subject in ASPECTS:
            of_subject = [prompt for prompt in prompts if subject_of(prompt) == subject]
            assert len(of_subject) > len(prompts) / 10
            assert set(of_subject) <= every_prompt(subject)
        for words in (*STYLES, *COMPANIONS, *TIMES, f"this {STYLES[0]}", f"the {STYLES[0]}"):
            assert any(f" {words} " in prompt for prompt in prompts), words


def test_a_subject_can_be_held_out():
    """Bug: a held-out subject is also trained on, or is never evaluated."""
    train, heldout = make_prompts(0, 300, 300, held_out="hotel")
    assert {subject_of(prompt) for prompt in train} == set(ASPECTS) - {"hotel"}
    assert {subject_of(prompt) for prompt in heldout} == set(ASPECTS)
    assert 20 < sum(subject_of(prompt) == "hotel" for prompt in heldout) < 150


def test_too_many_prompts_are_refused():
    """Bug: an endless search for prompts that do not exist. Two thirds of them can be had."""
    room = len(every_prompt("film"))
    most = 2 * room // 3
    train, heldout = make_prompts(0, most - 100, 100, subjects=("film",))
    assert len({*train, *heldout}) == most
    for n_train, n_heldout in [(most - 99, 100), (100, most - 99), (10 ** 9, 1)]:
        with pytest.raises(ValueError, match=f"has {room} prompts: {n_train} \\+ {n_heldout} of them"):
            make_prompts(0, n_train, n_heldout, subjects=("film",))
    # a subject that is held out adds no prompts to train on
    assert len(make_prompts(0, most + 1, 0, subjects=("film", "hotel"))[0]) == most + 1
    with pytest.raises(ValueError, match=f"has {room} prompts"):
        make_prompts(0, most + 1, 0, subjects=("film", "hotel"), held_out="hotel")


# ---- reviews, demonstrations, documents ------------------------------------------------------------------------------

def clauses_of(text):
    return re.split(r" (?:\.|and|but) ?", text.removesuffix(" ."))


@pytest.mark.parametrize("mood", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("aspect, forms", [
    ("plot", [" not ", " never ", " really ", " quite ", " very ", " was ", "i "]),
    ("verdict", [" not ", " would "]),
])
def test_the_mood_of_a_clause_is_the_chance_of_praise(aspect, forms, mood):
    """Bug: demonstrations have a bias. "not bad" is praise, so after a negation the word has the other sign."""
    rng = random.Random(1)
    texts = [make_clause(rng, aspect, mood) for _ in range(3000)]
    parsed = [parse_clause(text) for text in texts]
    assert {name for name, _ in parsed} == {aspect}
    praise = sum(valence > 0 for _, valence in parsed) / 3000
    assert abs(praise - mood) <= 5 * (mood * (1 - mood) / 3000) ** 0.5  # five standard errors
    for form in forms:
        assert any(form in text for text in texts), form
    negated = sum(" not " in text or " never " in text for text in texts) / 3000
    assert negated == pytest.approx(0.1, abs=0.03)


def test_a_review_says_nothing_twice_and_joins_what_agrees():
    """Bug: an aspect that comes twice, "good and bad", "good but fine", or another number of sentences."""
    rng = random.Random(2)
    for sentences in (1, 3, 5) * 200:
        review = make_review(rng, "film", 0.5, sentences)
        assert review.endswith(" .")
        assert review.split().count(".") == sentences
        aspects = [parse_clause(text)[0] for text in clauses_of(review)]
        assert len(set(aspects)) == len(aspects)
        assert set(aspects) <= {*ASPECTS["film"], "verdict"}
        for sentence in review.removesuffix(" .").split(" . "):
            joint = re.search(" (and|but) ", sentence)
            if joint:
                first = parse_clause(sentence[:joint.start()])[1] > 0
                second = parse_clause(sentence[joint.end():])[1] > 0
                assert (first == second) == (joint[1] == "and")
    everything = make_review(rng, "film", 0.5, 99)  # the review ends when every aspect has been named
    assert {parse_clause(text)[0] for text in clauses_of(everything)} == {*ASPECTS["film"], "verdict"}


def test_demonstrations_have_no_faults_and_are_mediocre():
    """Bug: demonstrations with faults, perfect ones that leave nothing to gain, or a language that is hard to learn."""
    rng = random.Random(3)
    sentiments, lengths, words = [], [], set()
    for _ in range(1500):
        prompt = make_prompt(rng)
        text = make_demonstration(rng, prompt)
        valences = [parse_clause(clause)[1] for clause in clauses_of(text)]
        sentiments.append(max(-2, min(2, sum(valences) / len(valences))))
        assert gold(prompt, text) == pytest.approx(sentiments[-1] + min(len(valences), 4) / 2)  # without faults
        lengths.append(text.split().count("."))
        words.update(prompt.split(), text.split())
    assert set(lengths) == {1, 2, 3, 4}
    assert abs(sum(sentiments) / 1500) < 0.2
    assert min(sentiments) < -1.5
    assert max(sentiments) > 1.5
    aspects = list(itertools.chain(*ASPECTS.values()))
    assert len(set(aspects)) == len(aspects)  # no aspect belongs to two subjects
    assert {*ADJECTIVES, *VERBS, *INTENSIFIERS, *aspects} <= words
    assert 150 <= len(words) <= 400
    assert all(re.fullmatch(r"[a-z]+|\.", word) for word in words)


def test_documents_are_messier_than_demonstrations():
    """Bug: pretraining on perfect text leaves nothing to SFT. Some have faults, are cut short or leave the topic."""
    rng = random.Random(4)
    documents = [make_document(rng) for _ in range(1000)]
    all_aspects = set(itertools.chain(*ASPECTS.values()))
    with_prompt = broken = off_topic = 0
    for document in documents:
        review = document
        if " with my " in document:
            with_prompt += 1
            prompt, _, review = document.partition(" . ")
            named = set(re.findall(r"the (\w+)", review)) & all_aspects
            off_topic += bool(named) and not named & set(ASPECTS[subject_of(prompt)])
        broken += any(parse_clause(text) is None for text in clauses_of(review))
    assert 100 < with_prompt < 300
    assert 100 < broken < 400  # most of them are grammatical
    assert 0 < off_topic < with_prompt / 2
    assert all(documents)
    assert 50 < sum(not document.endswith(" .") for document in documents) < 200
    demonstrations = [make_demonstration(rng, make_prompt(rng)) for _ in range(1000)]
    assert sum(map(len, documents)) > 1.5 * sum(map(len, demonstrations))
    words = set(" ".join(documents).split())
    assert all(set(aspects) & words for aspects in ASPECTS.values())  # all subjects come


def test_writers_draw_from_their_generator_only():
    """Bug: texts that the seed does not decide, or the global random numbers."""
    def write(seed):
        rng = random.Random(seed)
        prompt = make_prompt(rng)
        return prompt, make_demonstration(rng, prompt), make_document(rng), make_prompts(seed, 5, 5)

    state = random.getstate()
    first = write(1)
    assert random.getstate() == state
    random.seed(5)
    assert write(1) == first
    assert write(2) != first
