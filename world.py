"""
The built-in world: a little language of reviews whose true reward is known.

    prompt    i saw this little film with my sister last night .
    response  the plot was slow but i really loved the music . i would recommend it .

A prompt sets the scene, a response is one to four sentences of opinion. `gold` is the oracle reward of 'RLHF
Deciphered' (arXiv:2404.08555, section 4.1): a fixed function of the text, in place of people's true wishes. It
labels preferences and judges policies, and trains none but with --reward-from gold.

`task` is the other kind of reward: a rule that a program can check, passed or not.

The language is tiny, but it keeps what RLHF needs: a bag of words is wrong (negation, intensifiers), the prompt matters
(the soup is off topic in a hotel review), and more of the same does not help (breadth saturates, repetition costs).

Units: `gold` is in points here. The pipeline scales it to mean 0 and standard deviation 1 on the SFT policy.
"""

import random
import re

ASPECTS = {  # subject -> what a review of it can be about
    "film": "plot acting music cast ending script camera dialogue hero villain pace set".split(),
    "restaurant": "food service soup wine dessert waiter menu bread salad coffee kitchen table".split(),
    "hotel": "room bed staff breakfast pool lobby view bathroom lift garden terrace carpet".split(),
    "book": "story style author title cover language humour beginning preface epilogue paper print".split(),
    "concert": "singer band sound stage crowd lighting programme encore drummer pianist hall finale".split(),
}
OPENINGS = {
    "film": ["i saw", "we watched"],
    "restaurant": ["i ate at", "we tried"],
    "hotel": ["i stayed at", "we booked"],
    "book": ["i read", "we discussed"],
    "concert": ["i went to", "we heard"],
}
STYLES = "new old little famous cheap popular foreign modern quiet busy".split()
COMPANIONS = "sister brother mother father wife husband friends boss cousin neighbours uncle aunt".split()
TIMES = ["last night", "last week", "yesterday", "this morning", "on monday", "on sunday",
         "in the spring", "in the summer", "over christmas", "for my birthday"]

ADJECTIVES = {  # valence, in points
    **dict.fromkeys("brilliant wonderful superb charming delightful splendid marvellous".split(), 2),
    **dict.fromkeys("good nice pleasant fine solid fresh clever pretty".split(), 1),
    **dict.fromkeys("bad dull slow poor tired strange noisy plain".split(), -1),
    **dict.fromkeys("awful terrible dreadful horrible disgusting hopeless dismal".split(), -2),
}
VERBS = {"loved": 2, "adored": 2, "liked": 1, "enjoyed": 1, "disliked": -1, "regretted": -1, "hated": -2, "loathed": -2}
VERDICTS = {"recommend it": 1, "come back": 1, "do it again": 1, "complain": -1, "warn people": -1}
INTENSIFIERS = {"very": 1.5, "really": 1.5, "quite": 0.5, "rather": 0.5}
NEGATION = -0.5  # "not brilliant" is mildly bad, "not terrible" mildly good


def _one_of(words):
    return "(" + "|".join(words) + ")"


_ASPECT = _one_of([aspect for aspects in ASPECTS.values() for aspect in aspects])
_WAS = re.compile(f"the {_ASPECT} was (not )?(?:{_one_of(INTENSIFIERS)} )?{_one_of(ADJECTIVES)}")
_VERB = re.compile(f"i (never )?(?:(really) )?{_one_of(VERBS)} the {_ASPECT}")
_WOULD = re.compile(f"i would (not )?{_one_of(VERDICTS)}")


# ---- the oracle -----------------------------------------------------------------------------------

def parse_clause(clause):
    """(aspect, valence in points) of a clause, None for anything else. "i would come back" has the aspect 'verdict'."""
    if match := _WAS.fullmatch(clause):
        aspect, negated, intensifier, word = match.groups()
        valence = ADJECTIVES[word]
    elif match := _VERB.fullmatch(clause):
        negated, intensifier, word, aspect = match.groups()
        valence = VERBS[word]
    elif match := _WOULD.fullmatch(clause):
        (negated, word), intensifier, aspect = match.groups(), None, "verdict"
        valence = VERDICTS[word]
    else:
        return None
    return aspect, valence * INTENSIFIERS.get(intensifier, 1.0) * (NEGATION if negated else 1.0)


def gold(prompt, response):
    """
    The oracle reward R*(prompt, response) in raw points, within [-4, 4]:

        gold = clip(mean valence of the good clauses, -2, 2)  +  min(good clauses, 4) / 2  -  min(faults, 4) / 2

    A good clause parses, is about the prompt's subject, and names an aspect for the first time. Faults are clauses that
    are broken, off topic or repeated, and a missing full stop at the end.
    """
    valences, faults = read_review(prompt, response)
    sentiment = sum(valences.values()) / max(len(valences), 1)
    return max(-2.0, min(2.0, sentiment)) + (min(len(valences), 4) - min(faults, 4)) / 2


def task(prompt, response):
    """
    A verifiable task, 1.0 or 0.0: the review praises at least two aspects of the prompt's subject, criticises nothing,
    and has no fault (see `gold`; so it ends with a full stop). A verdict is no aspect.
    """
    valences, faults = read_review(prompt, response)
    praised = sum(valence > 0 for aspect, valence in valences.items() if aspect != "verdict")
    return float(faults == 0 and praised >= 2 and min(valences.values()) > 0)


def read_review(prompt, response):
    """({aspect: valence} of the good clauses, number of faults) of a response."""
    subject = subject_of(prompt)
    text = response.strip()
    faults = 0 if text.endswith(".") else 1
    valences = {}
    for clause in re.split(r" \.| and | but ", text.removesuffix(".").rstrip()):
        parsed = parse_clause(clause.strip())
        if parsed is None:
            faults += 1
            continue
        aspect, valence = parsed
        on_topic = aspect == "verdict" or aspect in ASPECTS.get(subject, ())
        if on_topic and aspect not in valences:
            valences[aspect] = valence
        else:
            faults += 1
    return valences, faults


def subject_of(prompt):
    """The subject that a prompt names ('film', ...), or None."""
    return next((subject for subject in ASPECTS if subject in prompt.split()), None)


# ---- prompts, demonstrations, and the messier text of pretraining ---------------------------------

def make_prompt(rng, subjects=tuple(ASPECTS)):
    """One prompt, e.g. 'we tried the cheap restaurant with my boss on monday .' (rng: random.Random)."""
    subject = rng.choice(subjects)
    return (f"{rng.choice(OPENINGS[subject])} {rng.choice(['this', 'the'])} {rng.choice(STYLES)} {subject} "
            f"with my {rng.choice(COMPANIONS)} {rng.choice(TIMES)} .")


def make_prompts(seed, n_train, n_heldout, held_out=""):
    """
    Two disjoint lists of distinct prompts, (training, held-out). The subject `held_out` is in the second list only.

    There are 4,800 prompts for each of the five subjects.
    """
    rng = random.Random(seed)
    subjects = tuple(ASPECTS)
    seen = [s for s in subjects if s != held_out]
    train, heldout = {}, {}  # dicts keep the order in which the prompts were made
    while len(train) < n_train:
        train[make_prompt(rng, seen)] = None
    while len(heldout) < n_heldout:
        prompt = make_prompt(rng, subjects)
        if prompt not in train:
            heldout[prompt] = None
    return list(train), list(heldout)


def make_clause(rng, aspect, mood):
    """One clause about an aspect; mood in [0, 1] is the chance that it is praise."""
    praise = rng.random() < mood
    negated = rng.random() < 0.1
    positive = praise != negated  # 'not bad' is praise: under a negation the word itself has the other sign
    intensified = rng.random() < 0.3
    if aspect == "verdict":
        words = [word for word, valence in VERDICTS.items() if (valence > 0) == positive]
        return f"i would {'not ' if negated else ''}{rng.choice(words)}"
    if rng.random() < 0.3:
        words = [word for word, valence in VERBS.items() if (valence > 0) == positive]
        return f"i {'never ' if negated else ''}{'really ' if intensified else ''}{rng.choice(words)} the {aspect}"
    words = [word for word, valence in ADJECTIVES.items() if (valence > 0) == positive]
    intensifier = rng.choice(list(INTENSIFIERS)) + " " if intensified else ""
    return f"the {aspect} was {'not ' if negated else ''}{intensifier}{rng.choice(words)}"


def make_review(rng, subject, mood, sentences):
    """Sentences about a subject, each aspect at most once. Clauses that agree are joined by 'and', others by 'but'."""
    aspects = rng.sample([*ASPECTS[subject], "verdict"], len(ASPECTS[subject]) + 1)
    review = []
    while len(review) < sentences and aspects:
        clause = make_clause(rng, aspects.pop(), mood)
        if aspects and rng.random() < 0.3:
            second = make_clause(rng, aspects.pop(), mood)
            agree = (parse_clause(clause)[1] > 0) == (parse_clause(second)[1] > 0)
            clause = f"{clause} {'and' if agree else 'but'} {second}"
        review.append(clause + " .")
    return " ".join(review)


def make_demonstration(rng, prompt):
    """A mediocre answer, so that there is something to gain: grammatical and on topic, but often negative or short."""
    mood = rng.choice([0.05, 0.5, 0.95])
    sentences = rng.choice([1, 2, 2, 3, 3, 4])
    return make_review(rng, subject_of(prompt), mood, sentences)


def make_document(rng):
    """A pretraining text: a long review, mostly without a prompt; sometimes off topic, cut, or with a word wrong."""
    prompt = make_prompt(rng)
    subject = rng.choice(list(ASPECTS)) if rng.random() < 0.2 else subject_of(prompt)
    words = make_review(rng, subject, mood=rng.choice([0.0, 1.0]), sentences=8).split()
    if rng.random() < 0.2:
        at = rng.randrange(len(words))
        words[at:at + 1] = rng.choice([[], [words[at]] * 2, [rng.choice(words)]])
    if rng.random() < 0.1:
        words = words[:rng.randrange(1, len(words) + 1)]
    return " ".join(([prompt] if rng.random() < 0.2 else []) + words)
