"""
Tests of world.py: the oracle reward against sums worked out by hand, the writers against the language of the world.

A docstring names the bugs that its test catches. P1, P2, ... are the pitfalls that tests/mutants.py plants.
"""

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
HOTEL = "we booked the quiet hotel with my boss in the spring ."
OTHER_WORDS = "the was not never really very i would recommend it come back complain and but . . . of".split()
WORDS = sorted({*ADJECTIVES, *VERBS, *INTENSIFIERS, *itertools.chain(*ASPECTS.values()), *OTHER_WORDS})


# ---- the oracle ------------------------------------------------------------------------------------------------------

# points = mean valence of the good clauses, clipped at +-2, + good clauses / 2 - faults / 2
BY_HAND = [
    # one clause: valence + 1/2
    ("the plot was good .", 1 + 0.5),
    ("the plot was brilliant .", 2 + 0.5),
    ("the plot was bad .", -1 + 0.5),
    ("the plot was awful .", -2 + 0.5),
    ("i loved the plot .", 2 + 0.5),
    ("i liked the plot .", 1 + 0.5),
    ("i disliked the plot .", -1 + 0.5),
    ("i hated the plot .", -2 + 0.5),
    ("i would recommend it .", 1 + 0.5),
    ("i would complain .", -1 + 0.5),
    # negation is worth minus a half
    ("the plot was not good .", -0.5 + 0.5),
    ("the plot was not terrible .", 1 + 0.5),
    ("i never loved the plot .", -1 + 0.5),
    ("i would not recommend it .", -0.5 + 0.5),
    ("i would not complain .", 0.5 + 0.5),
    # intensifiers: very and really one and a half, quite and rather a half; the mean is clipped at 2
    ("the plot was very good .", 1.5 + 0.5),
    ("the plot was really bad .", -1.5 + 0.5),
    ("the plot was quite good .", 0.5 + 0.5),
    ("the plot was rather awful .", -1 + 0.5),
    ("the plot was very brilliant .", 2 + 0.5),       # 3 is clipped to 2
    ("the plot was really awful .", -2 + 0.5),        # -3 is clipped to -2
    ("the plot was not very good .", -0.75 + 0.5),
    ("the plot was not quite terrible .", 0.5 + 0.5),
    ("i really enjoyed the plot .", 1.5 + 0.5),
    ("i never really loved the plot .", -1.5 + 0.5),
    # several clauses: the mean of the valences; the mean is clipped, not the clauses
    ("the plot was good . the cast was brilliant .", 1.5 + 1),
    ("the plot was good and the cast was brilliant .", 1.5 + 1),
    ("the plot was good but the cast was awful .", -0.5 + 1),
    ("the plot was very brilliant . i disliked the cast .", (3 - 1) / 2 + 1),
    ("the plot was very brilliant . i really hated the cast . the hero was bad .", (3 - 3 - 1) / 3 + 1.5),
    ("the plot was good . i liked the cast and i would come back . the music was nice .", 1 + 2),
    # breadth saturates at four good clauses, in the points but not in the mean
    ("the plot was good . i liked the cast . the hero was nice . the music was fine . i would come back .", 1 + 2),
    ("the plot was good . i liked the cast . the hero was nice . the music was fine . the pace was dull .", 3 / 5 + 2),
    # off topic and repetition: no valence, one fault each; the first opinion of an aspect counts
    ("the soup was good .", 0 - 0.5),
    ("the plot was good . the soup was brilliant .", 1 + 0.5 - 0.5),
    ("the plot was good . the plot was good .", 1 + 0.5 - 0.5),
    ("the plot was good . i hated the plot .", 1 + 0.5 - 0.5),
    ("the plot was good . i hated the plot . the plot was very fine .", 1 + 0.5 - 1),
    ("i would recommend it . i would complain .", 1 + 0.5 - 0.5),
    # broken grammar: one fault for each clause
    ("plot was good .", -0.5),
    ("the plot was very very good .", -0.5),
    ("the plot was very not good .", -0.5),
    ("the plot was goodness .", -0.5),
    ("the plot was good it .", -0.5),
    ("so the plot was good .", -0.5),
    ("the  plot was good .", -0.5),
    ("i very loved the plot .", -0.5),
    ("i not loved the plot .", -0.5),
    ("i would never recommend it .", -0.5),
    ("i would recommend .", -0.5),
    ("the plot was loved .", -0.5),
    ("The plot was good .", -0.5),
    ("the plot was good . the cast was .", 1 + 0.5 - 0.5),
    ("the plot was good and .", -0.5),                                 # nothing follows the 'and': one broken clause
    ("the plot was good . and the cast was fine .", 1 + 1 - 0.5),      # nothing stands before the 'and'
    ("the plot was good . .", 1 + 0.5 - 0.5),
    # no full stop
    ("the plot was good", 1 + 0.5 - 0.5),
    ("the plot was good . the cast was fine", 1 + 1 - 0.5),
    ("the plot was", -0.5 - 0.5),
    ("", -0.5 - 0.5),
    (".", -0.5),
    # faults saturate at four
    ("the plot was good . a . b . c .", 1 + 0.5 - 1.5),
    ("the plot was good . a . b . c . d .", 1 + 0.5 - 2),
    ("the plot was good . a . b . c . d . e . f .", 1 + 0.5 - 2),
    ("the plot was good . a . b . c . d", 1 + 0.5 - 2),
    # blanks around the text do not matter
    (" the plot was good . ", 1 + 0.5),
    ("\nthe plot was good .\n", 1 + 0.5),
]


@pytest.mark.parametrize("response, points", BY_HAND)
def test_gold_is_what_the_formula_says_by_hand(response, points):
    """Catches a wrong effect of negation, intensifiers, topic, repetition, grammar, full stop or saturation (P70)."""
    assert gold(FILM, response) == pytest.approx(points, abs=1e-12)


@pytest.mark.parametrize("response, praise, criticism, indifferent", [
    ("the plot was good .", 1.5, -0.5, 0.5),
    ("i hated the plot . the soup was good .", -2, 2, 0),
    ("the plot was very brilliant . i would come back", 2 + 0.5, -2 + 0.5, 0.5),
])
def test_taste_turns_the_sentiment_and_nothing_else(response, praise, criticism, indifferent):
    """Catches a taste that multiplies breadth or faults, or the sentiment before it is clipped. 1 is the default."""
    for taste, points in [(1.0, praise), (-1.0, criticism), (0.0, indifferent), (0.5, (praise + indifferent) / 2)]:
        assert gold(FILM, response, taste=taste) == pytest.approx(points, abs=1e-12)
    assert gold(FILM, response) == gold(FILM, response, 1.0)


@pytest.mark.parametrize("texts, points", [
    (("the plot was not good but the cast was bad .", "the plot was good but the cast was not bad ."), (0.25, 1.75)),
    (("the plot was very good . the cast was bad .", "the plot was good . the cast was very bad ."), (1.25, 0.75)),
    (("i never liked the plot . i hated the cast .", "i liked the plot . i never hated the cast ."), (-0.25, 2)),
])
def test_a_bag_of_words_is_wrong(texts, points):
    """Catches a reward that counts words: the same words in another order are worth something else."""
    one, other = texts
    assert sorted(one.split()) == sorted(other.split())
    assert (gold(FILM, one), gold(FILM, other)) == pytest.approx(points)


def test_the_prompt_decides_what_is_on_topic():
    """Catches a prompt that is ignored (P70). Aspects of another subject are off topic, and a verdict never is."""
    for (subject, aspects), prompt_subject in itertools.product(ASPECTS.items(), ASPECTS):
        prompt = make_prompt(random.Random(0), [prompt_subject])
        assert subject_of(prompt) == prompt_subject
        on_topic = subject == prompt_subject
        for aspect in aspects:
            assert gold(prompt, f"the {aspect} was good .") == (1.5 if on_topic else -0.5)
            assert gold(prompt, f"i hated the {aspect} .") == (-1.5 if on_topic else -0.5)
        assert gold(prompt, "i would recommend it .") == 1.5
    assert gold(FILM, "the room was good .") < gold(HOTEL, "the room was good .")
    # a prompt without a subject
    assert subject_of("we talked about filming .") is None
    assert gold("nothing .", "the plot was good .") == -0.5
    assert gold("nothing .", "i would recommend it .") == 1.5


def test_every_word_has_its_valence():
    """Catches a word without effect: every adjective, verb and verdict is parsed plain, negated and intensified."""
    for word, valence in ADJECTIVES.items():
        assert parse_clause(f"the plot was {word}") == ("plot", valence)
        assert parse_clause(f"the plot was not {word}") == ("plot", valence * NEGATION)
        for intensifier, factor in INTENSIFIERS.items():
            assert parse_clause(f"the plot was {intensifier} {word}") == ("plot", valence * factor)
            assert parse_clause(f"the plot was not {intensifier} {word}") == ("plot", valence * factor * NEGATION)
    for word, valence in VERBS.items():
        assert parse_clause(f"i {word} the menu") == ("menu", valence)
        assert parse_clause(f"i never {word} the menu") == ("menu", -valence / 2)
        assert parse_clause(f"i really {word} the menu") == ("menu", 1.5 * valence)
    for word, valence in VERDICTS.items():
        assert parse_clause(f"i would {word}") == ("verdict", valence)
        assert parse_clause(f"i would not {word}") == ("verdict", -valence / 2)


def test_the_tables_of_words():
    """Catches a word with the valence of its neighbour, and a table with praise or criticism only."""
    for table in (ADJECTIVES, VERBS, VERDICTS):
        assert {abs(valence) for valence in table.values()} <= {1, 2}
        assert sum(valence > 0 for valence in table.values()) >= 2
        assert sum(valence < 0 for valence in table.values()) >= 2
    known = dict(good=1, superb=2, noisy=-1, dreadful=-2, enjoyed=1, adored=2, regretted=-1, loathed=-2)
    assert {word: {**ADJECTIVES, **VERBS}[word] for word in known} == known
    assert INTENSIFIERS == {"very": 1.5, "really": 1.5, "quite": 0.5, "rather": 0.5}
    assert NEGATION == -0.5


@st.composite
def clauses(draw):
    """(words, aspect, valence) of a clause; the aspect is None where it does not parse."""
    form = draw(st.sampled_from(["was", "verb", "verdict", "broken"]))
    if form == "broken":
        return draw(st.sampled_from(["the plot", "very good", "i"])), None, 0
    if form == "verdict":
        word = draw(st.sampled_from(list(VERDICTS)))
        return f"i would {word}", "verdict", VERDICTS[word]
    aspect = draw(st.sampled_from([*ASPECTS["film"], "soup", "room"]))
    negated = draw(st.booleans())
    sign = -0.5 if negated else 1
    if form == "verb":
        word = draw(st.sampled_from(list(VERBS)))
        return f"i {'never ' if negated else ''}{word} the {aspect}", aspect, sign * VERBS[word]
    word = draw(st.sampled_from(list(ADJECTIVES)))
    intensifier = draw(st.sampled_from(["", *INTENSIFIERS]))
    words = " ".join(["the", aspect, "was", *["not"] * negated, *[intensifier] * (intensifier != ""), word])
    return words, aspect, sign * ADJECTIVES[word] * INTENSIFIERS.get(intensifier, 1)


joints_of_clauses = st.lists(st.sampled_from([" . ", " and ", " but "]), min_size=9, max_size=9)


@few
@given(st.lists(clauses(), min_size=1, max_size=9), joints_of_clauses, st.booleans(), st.sampled_from([1.0, -1.0, 0.3]))
def test_gold_agrees_with_the_text_as_it_was_built(plan, joints, ended, taste):
    """Catches a parser that loses or merges clauses. A text is built from known clauses, and their points are added."""
    text = plan[0][0]
    for joint, (words, _, _) in zip(joints, plan[1:]):
        text += joint + words
    good, faults = {}, 0
    if ended:
        text += " ."
    else:
        faults += 1
    for _, aspect, valence in plan:
        if aspect in (None, "soup", "room") or aspect in good:
            faults += 1
        else:
            good[aspect] = valence
    mean = sum(good.values()) / len(good) if good else 0
    points = taste * min(2, max(-2, mean)) + min(4, len(good)) / 2 - min(4, faults) / 2
    assert gold(FILM, text, taste) == pytest.approx(points, abs=1e-12)


any_text = st.text("ab.,'AZ0 \n\t\x00\u00a0\u2003\u00e9\U0001f600")  # all of Unicode would take seconds to set up
word_salad = st.lists(st.sampled_from(WORDS), max_size=60).map(" ".join)


@few
@given(st.one_of(any_text, word_salad), st.floats(-1, 1))
def test_gold_is_bounded_and_deterministic(text, taste):
    """Catches a reward without bound: any text is worth between -4 and 4 points, the same at every call."""
    for prompt in (FILM, HOTEL, text):
        points = gold(prompt, text, taste)
        assert -4 <= points <= 4
        assert points == gold(prompt, text, taste)


def test_gold_reaches_its_bounds():
    """Catches a scale of which a part is never used, and a reward for length: the best text is worth 4 points."""
    best = "the plot was brilliant . i loved the cast . the hero was superb . the music was charming ."
    assert gold(FILM, best) == 4
    assert gold(FILM, best + " the pace was splendid .") == 4
    assert gold(FILM, best + " " + best) == 2
    assert gold(FILM, best, taste=-1.0) == 0
    assert gold(FILM, "the plot was awful . a . b . c . d .") == -2 + 0.5 - 2  # no text is worth less
    assert gold(FILM, "a . b . c . d .") == -2


# ---- prompts ---------------------------------------------------------------------------------------------------------

def every_prompt(subject):
    prompts = set()
    for opening, the, style in itertools.product(OPENINGS[subject], ["this", "the"], STYLES):
        for companion, time in itertools.product(COMPANIONS, TIMES):
            prompts.add(f"{opening} {the} {style} {subject} with my {companion} {time} .")
    return prompts


def test_prompts_are_distinct_disjoint_and_as_many_as_asked():
    """Catches held-out prompts that are also trained on (P74), repeated prompts, and lists of another length."""
    train, heldout = make_prompts(0, 2000, 500)
    assert (len(train), len(heldout)) == (2000, 500)
    assert len({*train, *heldout}) == 2500
    assert make_prompts(0, 2000, 500) == (train, heldout)
    assert make_prompts(1, 2000, 500)[0] != train


def test_every_part_of_a_prompt_varies():
    """Catches a subject, style, companion or time that never comes, and prompts outside the language."""
    for prompts in make_prompts(0, 2000, 500):
        for subject in ASPECTS:
            of_subject = [prompt for prompt in prompts if subject_of(prompt) == subject]
            assert len(of_subject) > len(prompts) / 10
            assert set(of_subject) <= every_prompt(subject)
        for words in (*STYLES, *COMPANIONS, *TIMES, f"this {STYLES[0]}", f"the {STYLES[0]}"):
            assert any(f" {words} " in prompt for prompt in prompts), words


def test_a_subject_can_be_held_out():
    """Catches a held-out subject that is also trained on, or that is never evaluated."""
    train, heldout = make_prompts(0, 300, 300, held_out="hotel")
    assert {subject_of(prompt) for prompt in train} == set(ASPECTS) - {"hotel"}
    assert not any("hotel" in prompt for prompt in train)
    assert {subject_of(prompt) for prompt in heldout} == set(ASPECTS)
    assert 20 < sum(subject_of(prompt) == "hotel" for prompt in heldout) < 150
    for prompts in make_prompts(0, 50, 50, subjects=("film", "book")):
        assert {subject_of(prompt) for prompt in prompts} == {"film", "book"}


def test_too_many_prompts_are_refused():
    """Catches an endless search for prompts that do not exist. Two thirds of them can be had."""
    room = len(every_prompt("film"))
    most = 2 * room // 3
    train, heldout = make_prompts(0, most - 100, 100, subjects=("film",))
    assert len({*train, *heldout}) == most
    for n_train, n_heldout in [(most - 99, 100), (100, most - 99), (most + 1, 0), (10 ** 9, 1)]:
        with pytest.raises(ValueError, match=f"has {room} prompts: {n_train} \\+ {n_heldout} of them"):
            make_prompts(0, n_train, n_heldout, subjects=("film",))
    with pytest.raises(ValueError, match=f"has {5 * room} prompts"):
        make_prompts(0, 5 * most + 5, 0)
    # a subject that is held out adds no prompts to train on
    assert len(make_prompts(0, most + 1, 0, subjects=("film", "hotel"))[0]) == most + 1
    with pytest.raises(ValueError, match=f"has {room} prompts"):
        make_prompts(0, most + 1, 0, subjects=("film", "hotel"), held_out="hotel")


def test_the_language_has_the_promised_size():
    """Catches a language that is too small or too large to learn, an unused word, and a word with a blank or a sign."""
    rng = random.Random(0)
    words = set()
    for _ in range(3000):
        prompt = make_prompt(rng)
        words.update(prompt.split())
        words.update(make_demonstration(rng, prompt).split())
    assert len(ASPECTS) >= 3
    assert set(ASPECTS) == set(OPENINGS)
    assert 150 <= len(words) <= 400
    assert all(re.fullmatch(r"[a-z]+|\.", word) for word in words)
    aspects = list(itertools.chain(*ASPECTS.values()))
    assert {*ADJECTIVES, *VERBS, *INTENSIFIERS, *aspects} <= words
    assert len(set(aspects)) == len(aspects)  # no aspect belongs to two subjects


# ---- reviews, demonstrations, documents ------------------------------------------------------------------------------

def clauses_of(text):
    return re.split(r" (?:\.|and|but) ?", text.removesuffix(" ."))


@pytest.mark.parametrize("aspect, forms", [
    ("plot", [" not ", " never ", " really ", " quite ", " very ", " was ", "i "]),
    ("verdict", [" not ", " would "]),
])
def test_the_mood_of_a_clause_is_the_chance_of_praise(aspect, forms):
    """Catches a bias of the demonstrations: "not bad" is praise, so after a negation the word has the other sign."""
    for mood in (0.0, 0.3, 1.0):
        rng = random.Random(1)
        texts = [make_clause(rng, aspect, mood) for _ in range(3000)]
        parsed = [parse_clause(text) for text in texts]
        assert all(found[0] == aspect for found in parsed)
        praise = sum(valence > 0 for _, valence in parsed) / 3000
        if mood in (0, 1):
            assert praise == mood
        else:
            assert abs(praise - mood) < 0.04  # five standard errors
        for form in forms:
            assert any(form in text for text in texts), form
        negated = sum(" not " in text or " never " in text for text in texts) / 3000
        assert 0.03 < negated < 0.3


def test_a_review_says_nothing_twice_and_joins_what_agrees():
    """Catches an aspect that comes twice, "good and bad", "good but fine", and another number of sentences."""
    rng = random.Random(2)
    for sentences in (1, 3, 5):
        for _ in range(200):
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
    """
    Catches demonstrations with faults, and perfect ones, which PPO could not improve.

    With taste 0 only breadth and faults count. The sentiment is negative about as often as positive.
    """
    rng = random.Random(3)
    sentiments, lengths, joints = [], [], 0
    for _ in range(1500):
        prompt = make_prompt(rng)
        text = make_demonstration(rng, prompt)
        breadth = min(len(clauses_of(text)), 4) / 2
        assert gold(prompt, text, taste=0.0) == breadth
        sentiments.append(gold(prompt, text) - breadth)
        lengths.append(text.split().count("."))
        joints += len(clauses_of(text)) > lengths[-1]
    assert set(lengths) == {1, 2, 3, 4}
    assert 0.1 < joints / 1500 < 0.9
    assert abs(sum(sentiments) / 1500) < 0.2
    assert min(sentiments) < -1.5
    assert max(sentiments) > 1.5
    assert sum(s > 0 for s in sentiments) > 400
    assert sum(s < 0 for s in sentiments) > 400


def test_documents_are_messier_than_demonstrations():
    """
    Catches pretraining on perfect text, which leaves nothing to SFT.

    Documents are longer than demonstrations. Some have a broken clause, are cut short, or leave the topic of their
    prompt.
    """
    rng = random.Random(4)
    documents = [make_document(rng) for _ in range(1000)]
    with_prompt = [document for document in documents if " with my " in document]
    assert 0.05 < len(with_prompt) / 1000 < 0.5

    broken, off_topic = 0, 0
    all_aspects = set(itertools.chain(*ASPECTS.values()))
    for document in documents:
        prompt, review = "", document
        if document in with_prompt:
            prompt, _, review = document.partition(" . ")
            named = set(re.findall(r"the (\w+)", review)) & all_aspects
            off_topic += bool(named) and not named & set(ASPECTS[subject_of(prompt)])
        broken += any(parse_clause(text) is None for text in clauses_of(review))
    assert 0.05 < broken / 1000 < 0.6  # most of them are grammatical
    assert 0 < off_topic < len(with_prompt) / 2

    assert all(documents)
    assert 0.02 < sum(not document.endswith(" .") for document in documents) / 1000 < 0.5
    demonstrations = [make_demonstration(rng, make_prompt(rng)) for _ in range(1000)]
    assert sum(map(len, documents)) > 1.5 * sum(map(len, demonstrations))
    words = set(" ".join(documents).split())
    assert all(set(aspects) & words for aspects in ASPECTS.values())  # all subjects come


def test_writers_draw_from_their_generator_only():
    """Catches texts that the seed does not decide, and a use of the global random numbers."""
    def write(seed):
        rng = random.Random(seed)
        prompt = make_prompt(rng)
        return (prompt, make_demonstration(rng, prompt), make_document(rng), make_review(rng, "book", 0.5, 3),
                make_clause(rng, "plot", 0.5))

    random.seed(0)
    state = random.getstate()
    first = write(1)
    assert random.getstate() == state
    random.seed(5)
    assert write(1) == first
    assert write(2) != first
    assert make_prompts(3, 5, 5) == make_prompts(3, 5, 5)
