"""world.py: the oracle reward against sums done by hand, and the writers against the language that they claim to write."""

import itertools
import random
import re

import pytest
from helpers import few
from hypothesis import given
from hypothesis import strategies as st

import world
from world import (
    ADJECTIVES,
    ASPECTS,
    COMPANIONS,
    INTENSIFIERS,
    KINDS,
    NEGATION,
    OPENINGS,
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
WORDS = sorted({word for words in (ADJECTIVES, VERBS, INTENSIFIERS, *ASPECTS.values()) for word in words}
               | set("the was not never really very i would recommend it come back complain and but . . . of".split()))


# ---------------------------------------------------------------------------------------------------------------------
# the oracle, by hand: valence of the good clauses (mean, clipped) + good clauses / 2 - faults / 2

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
    # intensifiers: very and really one and a half, quite and rather a half; the mean is cut at 2
    ("the plot was very good .", 1.5 + 0.5),
    ("the plot was really bad .", -1.5 + 0.5),
    ("the plot was quite good .", 0.5 + 0.5),
    ("the plot was rather awful .", -1 + 0.5),
    ("the plot was very brilliant .", 2 + 0.5),       # 3 is cut to 2
    ("the plot was really awful .", -2 + 0.5),        # -3 is cut to -2
    ("the plot was not very good .", -0.75 + 0.5),
    ("the plot was not quite terrible .", 0.5 + 0.5),
    ("i really enjoyed the plot .", 1.5 + 0.5),
    ("i never really loved the plot .", -1.5 + 0.5),
    # several clauses: the mean of the valences; it is the mean that is cut, not the clauses
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
    """An oracle that pays for something else: negation, intensifiers, topic, repetition, grammar, full stop, saturation, each by hand."""
    assert gold(FILM, response) == pytest.approx(points, abs=1e-12)


@pytest.mark.parametrize("response, praise, criticism, indifferent", [
    ("the plot was good .", 1.5, -0.5, 0.5),
    ("i hated the plot . the soup was good .", -2, 2, 0),
    ("the plot was very brilliant . i would come back", 2 + 0.5, -2 + 0.5, 0.5),
])
def test_taste_turns_the_sentiment_and_nothing_else(response, praise, criticism, indifferent):
    """Annotators of different taste: taste must multiply the sentiment (after the cut) but not breadth and faults, and 1 is the default."""
    for taste, points in [(1.0, praise), (-1.0, criticism), (0.0, indifferent), (0.5, (praise + indifferent) / 2)]:
        assert gold(FILM, response, taste=taste) == pytest.approx(points, abs=1e-12)
    assert gold(FILM, response) == gold(FILM, response, 1.0)


def test_a_bag_of_words_is_wrong():
    """A reward that counts words: the same words in another order must be worth something else."""
    pairs = [
        ("the plot was not good but the cast was bad .", "the plot was good but the cast was not bad .", -0.75 + 1, 0.75 + 1),
        ("the plot was very good . the cast was bad .", "the plot was good . the cast was very bad .", 0.25 + 1, -0.25 + 1),
        ("i never liked the plot . i hated the cast .", "i liked the plot . i never hated the cast .", -1.25 + 1, 1 + 1),
    ]
    for one, other, first, second in pairs:
        assert sorted(one.split()) == sorted(other.split())
        assert (gold(FILM, one), gold(FILM, other)) == (pytest.approx(first), pytest.approx(second))


def test_the_prompt_decides_what_is_on_topic():
    """The prompt ignored: every aspect is on topic in reviews of its own subject and off topic in all others; a verdict always is on topic."""
    for (subject, aspects), asked in itertools.product(ASPECTS.items(), ASPECTS):
        prompt = make_prompt(random.Random(0), [asked])
        assert subject_of(prompt) == asked
        for aspect in aspects:
            assert gold(prompt, f"the {aspect} was good .") == (1.5 if subject == asked else -0.5)
            assert gold(prompt, f"i hated the {aspect} .") == (-1.5 if subject == asked else -0.5)
        assert gold(prompt, "i would recommend it .") == 1.5
    assert subject_of("we talked about filming .") is None
    assert gold("nothing .", "the plot was good .") == -0.5 and gold("nothing .", "i would recommend it .") == 1.5
    assert gold(FILM, "the room was good .") < gold(HOTEL, "the room was good .")


def test_every_word_has_its_valence():
    """A word without effect, or with the sign of its neighbour: every adjective, verb and verdict, plain, negated and intensified."""
    for word, valence in ADJECTIVES.items():
        for intensifier, factor in [("", 1), *((word + " ", factor) for word, factor in INTENSIFIERS.items())]:
            assert parse_clause(f"the plot was {intensifier}{word}") == ("plot", valence * factor)
            assert parse_clause(f"the plot was not {intensifier}{word}") == ("plot", valence * factor * NEGATION)
    for word, valence in VERBS.items():
        assert parse_clause(f"i {word} the menu") == ("menu", valence) and parse_clause(f"i never {word} the menu") == ("menu", -valence / 2)
        assert parse_clause(f"i really {word} the menu") == ("menu", 1.5 * valence)
    for word, valence in VERDICTS.items():
        assert parse_clause(f"i would {word}") == ("verdict", valence) and parse_clause(f"i would not {word}") == ("verdict", -valence / 2)
    for table in (ADJECTIVES, VERBS, VERDICTS):
        assert {abs(valence) for valence in table.values()} <= {1, 2} and sum(valence > 0 for valence in table.values()) >= 2
        assert sum(valence < 0 for valence in table.values()) >= 2
    signs = dict(good=1, superb=2, noisy=-1, dreadful=-2, enjoyed=1, adored=2, regretted=-1, loathed=-2)
    assert all({**ADJECTIVES, **VERBS}[word] == valence for word, valence in signs.items())
    assert INTENSIFIERS == {"very": 1.5, "really": 1.5, "quite": 0.5, "rather": 0.5} and NEGATION == -0.5


def one_of(words):
    return st.sampled_from(list(words))


some_aspect, negated = one_of([*ASPECTS["film"], "soup", "room"]), st.booleans()
factors = {"": 1, **{word + " ": factor for word, factor in INTENSIFIERS.items()}}
clause = st.one_of(  # (words, aspect, valence)
    st.builds(lambda aspect, n, i, w: (f"the {aspect} was {'not ' * n}{i}{w}", aspect, ADJECTIVES[w] * factors[i] / (-2 if n else 1)),
              some_aspect, negated, one_of(factors), one_of(ADJECTIVES)),
    st.builds(lambda aspect, n, w: (f"i {'never ' * n}{w} the {aspect}", aspect, VERBS[w] / (-2 if n else 1)),
              some_aspect, negated, one_of(VERBS)),
    st.builds(lambda w: (f"i would {w}", "verdict", VERDICTS[w]), one_of(VERDICTS)),
    one_of([("the plot", None, 0), ("very good", None, 0), ("i", None, 0)]),
)


@few
@given(st.lists(clause, min_size=1, max_size=9), st.lists(one_of([" . ", " and ", " but "]), min_size=9, max_size=9), st.booleans(),
       one_of([1.0, -1.0, 0.3]))
def test_gold_agrees_with_the_text_as_it_was_built(clauses, joints, ended, taste):
    """A parser that loses or merges clauses: a text built from known clauses has the points that its plan has, summed up without parsing."""
    text = clauses[0][0] + "".join(joint + words for joint, (words, _, _) in zip(joints, clauses[1:])) + (" ." if ended else "")
    good, faults = {}, 0 if ended else 1
    for _, aspect, valence in clauses:
        if aspect in (None, "soup", "room") or aspect in good:
            faults += 1
        else:
            good[aspect] = valence
    mean = sum(good.values()) / len(good) if good else 0
    assert gold(FILM, text, taste) == pytest.approx(taste * min(2, max(-2, mean)) + min(4, len(good)) / 2 - min(4, faults) / 2, abs=1e-12)


@few
@given(st.one_of(st.text(), st.lists(st.sampled_from(WORDS), max_size=60).map(" ".join)), st.floats(-1, 1))
def test_gold_is_bounded_and_deterministic(text, taste):
    """Reward without bound: whatever a policy writes, even word salad, is worth between -4 and 4 points, the same at every call."""
    for prompt in (FILM, HOTEL, text):
        points = gold(prompt, text, taste)
        assert -4 <= points <= 4 and points == gold(prompt, text, taste)


def test_gold_reaches_its_bounds():
    """A scale that is never used: the best text is worth 4 points, the worst -4, and longer is not better."""
    best = "the plot was brilliant . i loved the cast . the hero was superb . the music was charming ."
    assert gold(FILM, best) == 4 and gold(FILM, best + " the pace was splendid .") == 4 and gold(FILM, best + " " + best) == 2
    worst = "the plot was awful . a . b . c . d ."  # one clause is needed to have a valence
    assert gold(FILM, worst) == -2 + 0.5 - 2
    assert gold(FILM, best, taste=-1.0) == 0 and gold(FILM, "a . b . c . d .") == -2


# ---------------------------------------------------------------------------------------------------------------------
# prompts

def every_prompt(subject):
    return {f"{opening} {the} {kind} {subject} with my {companion} {time} ." for opening, the, kind, companion, time
            in itertools.product(OPENINGS[subject], ["this", "the"], KINDS, COMPANIONS, TIMES)}


def test_prompts_are_distinct_disjoint_and_as_many_as_asked():
    """Evaluation prompts seen in training: the two lists must share nothing, repeat nothing and have the asked lengths."""
    train, heldout = make_prompts(0, 2000, 500)
    assert (len(train), len(heldout)) == (2000, 500) and len({*train, *heldout}) == 2500
    allowed = {subject: every_prompt(subject) for subject in ASPECTS}
    for prompts in (train, heldout):
        for subject in ASPECTS:
            mine = [prompt for prompt in prompts if subject_of(prompt) == subject]
            assert len(mine) > len(prompts) / 10 and set(mine) <= allowed[subject]
        for words in (KINDS, COMPANIONS, TIMES):  # every part of a prompt varies
            assert all(any(f" {word} " in prompt for prompt in prompts) for word in words)
    assert make_prompts(0, 2000, 500) == (train, heldout) and make_prompts(1, 2000, 500)[0] != train
    assert {prompt.split(" ", 2)[2].split()[0] for prompt in train} >= {"this", "the"}


def test_a_subject_can_be_held_out():
    """A held-out subject that leaks into training, or that never comes at all."""
    train, heldout = make_prompts(0, 300, 300, held_out="hotel")
    assert not any(subject_of(prompt) == "hotel" or "hotel" in prompt for prompt in train)
    assert 20 < sum(subject_of(prompt) == "hotel" for prompt in heldout) < 150
    assert {subject_of(prompt) for prompt in heldout} == set(ASPECTS) and {subject_of(prompt) for prompt in train} == set(ASPECTS) - {"hotel"}
    only = make_prompts(0, 50, 50, subjects=("film", "book"))
    assert {subject_of(prompt) for prompts in only for prompt in prompts} == {"film", "book"}


def test_too_many_prompts_are_refused():
    """An endless search for prompts that do not exist: two thirds of the language can be had, more is a ValueError that says so."""
    room = len(every_prompt("film"))
    most = 2 * room // 3
    train, heldout = make_prompts(0, most - 100, 100, subjects=("film",))
    assert len({*train, *heldout}) == most
    for n_train, n_heldout in [(most - 99, 100), (100, most - 99), (most + 1, 0), (10 ** 9, 1)]:
        with pytest.raises(ValueError, match=f"{n_train} \\+ {n_heldout} .* {room}"):
            make_prompts(0, n_train, n_heldout, subjects=("film",))
    with pytest.raises(ValueError, match=str(room)):  # what is held out gives no room for training
        make_prompts(0, most + 1, 0, subjects=("film", "hotel"), held_out="hotel")
    assert len(make_prompts(0, most + 1, 0, subjects=("film", "hotel"))[0]) == most + 1
    with pytest.raises(ValueError, match=str(5 * room)):
        make_prompts(0, 5 * most + 5, 0)


def test_the_language_has_the_promised_size():
    """A language too small to be fun or too large to be learned: three subjects or more, 150 to 400 words, no word written with a blank or a sign."""
    rng = random.Random(0)
    prompts = [make_prompt(rng) for _ in range(4000)]
    words = {word for text in prompts + [make_demonstration(rng, prompt) for prompt in prompts] for word in text.split()}
    assert len(ASPECTS) >= 3 and set(ASPECTS) == set(OPENINGS) and 150 <= len(words) <= 400
    assert all(re.fullmatch(r"[a-z]+|\.", word) for word in words)
    assert set(ADJECTIVES) | set(VERBS) | set(INTENSIFIERS) | {aspect for aspects in ASPECTS.values() for aspect in aspects} <= words  # all are used
    assert len({aspect for aspects in ASPECTS.values() for aspect in aspects}) == sum(map(len, ASPECTS.values()))  # no aspect has two subjects


# ---------------------------------------------------------------------------------------------------------------------
# writers

def clauses_of(text):
    return re.split(r" (?:\.|and|but) ?", text.removesuffix(" ."))


@pytest.mark.parametrize("aspect", ["plot", "verdict"])
def test_the_mood_of_a_clause_is_the_chance_of_praise(aspect):
    """Demonstrations with a hidden bias: 'not bad' is praise, so under a negation the word must be of the other sign."""
    for mood in (0.0, 0.3, 1.0):
        rng = random.Random(1)
        clauses = [make_clause(rng, aspect, mood) for _ in range(3000)]
        parsed = [parse_clause(text) for text in clauses]
        assert all(found[0] == aspect for found in parsed)
        praise = sum(valence > 0 for _, valence in parsed) / 3000
        assert praise == mood if mood in (0, 1) else abs(praise - mood) < 0.04  # five standard errors
        kinds = [" not ", " would "] if aspect == "verdict" else [" not ", " never ", " really ", " quite ", " very ", " was ", "i "]
        for kind in kinds:
            assert any(kind in text for text in clauses), kind
        assert 0.03 < sum(" not " in text or " never " in text for text in clauses) / 3000 < 0.3


def test_a_review_says_nothing_twice_and_joins_what_agrees():
    """Demonstrations that the oracle punishes: repeated aspects, 'good and bad', 'good but fine', or another number of sentences than asked for."""
    rng = random.Random(2)
    for sentences in (1, 3, 5):
        for _ in range(200):
            review = make_review(rng, "film", 0.5, sentences)
            assert review.endswith(" .") and review.split().count(".") == sentences
            aspects = [parse_clause(text)[0] for text in clauses_of(review)]
            assert len(set(aspects)) == len(aspects) and set(aspects) <= {*ASPECTS["film"], "verdict"}
            for sentence in review.removesuffix(" .").split(" . "):
                joint = re.search(" (and|but) ", sentence)
                if joint:
                    first, second = (parse_clause(text)[1] > 0 for text in (sentence[:joint.start()], sentence[joint.end():]))
                    assert (first == second) == (joint[1] == "and")
    everything = make_review(rng, "film", 0.5, 99)  # when all has been said, the review ends
    assert {parse_clause(text)[0] for text in clauses_of(everything)} == {*ASPECTS["film"], "verdict"}


def test_demonstrations_have_no_faults_and_are_mediocre():
    """Nothing to gain, or nothing to imitate: demonstrations are faultless in form (taste 0 leaves breadth only) but as often sour as sweet."""
    rng = random.Random(3)
    sentiments, sentences, joints = [], [], 0
    for _ in range(1500):
        prompt = make_prompt(rng)
        text = make_demonstration(rng, prompt)
        clauses = clauses_of(text)
        breadth = min(len(clauses), 4) / 2
        assert gold(prompt, text, taste=0.0) == breadth
        sentiments.append(gold(prompt, text) - breadth)
        sentences.append(text.split().count("."))
        joints += len(clauses) > sentences[-1]
    assert set(sentences) == {1, 2, 3, 4} and 0.1 < joints / 1500 < 0.9
    assert abs(sum(sentiments) / 1500) < 0.2 and min(sentiments) < -1.5 and max(sentiments) > 1.5
    assert sum(s > 0 for s in sentiments) > 400 and sum(s < 0 for s in sentiments) > 400


def test_documents_are_messier_than_demonstrations():
    """Pretraining on perfect text leaves nothing for SFT: documents are longer, at times broken, cut short, or off the topic of their prompt."""
    rng = random.Random(4)
    documents = [make_document(rng) for _ in range(1000)]
    reviews = [document.partition(" . ")[2] if " with my " in document else document for document in documents]
    broken = [review for review in reviews if any(parse_clause(text) is None for text in clauses_of(review))]
    assert 0.05 < len(broken) / 1000 < 0.6  # most of it is grammatical all the same
    assert all(documents) and 0.02 < sum(not document.endswith(" .") for document in documents) / 1000 < 0.5
    scenes = [document for document in documents if " with my " in document]
    assert 0.05 < len(scenes) / 1000 < 0.5
    off_topic = 0
    for document in scenes:
        prompt, _, text = document.partition(" . ")
        aspects = {aspect for aspect in (re.findall(r"the (\w+)", text)) if any(aspect in known for known in ASPECTS.values())}
        off_topic += bool(aspects) and not aspects & set(ASPECTS[subject_of(prompt)])
    assert 0 < off_topic < len(scenes) / 2
    demonstrations = [make_demonstration(rng, make_prompt(rng)) for _ in range(1000)]
    assert sum(map(len, documents)) > 1.5 * sum(map(len, demonstrations))
    assert {subject for document in documents for subject, aspects in ASPECTS.items() if set(aspects) & set(document.split())} == set(ASPECTS)


def test_writers_draw_from_their_generator_only():
    """Texts that the seed does not decide, or that disturb somebody else's random numbers."""
    def write(seed):
        rng = random.Random(seed)
        prompt = make_prompt(rng)
        return prompt, make_demonstration(rng, prompt), make_document(rng), make_review(rng, "book", 0.5, 3), make_clause(rng, "plot", 0.5)

    random.seed(0)
    state = random.getstate()
    first = write(1)
    assert random.getstate() == state
    random.seed(5)
    assert write(1) == first and write(2) != first
    assert world.make_prompts(3, 5, 5) == world.make_prompts(3, 5, 5)
