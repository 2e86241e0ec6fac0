"""The text of the embedded corpus at full size: no sound is made here."""

import hashlib
import json
import re
from collections import Counter

import pytest

from manifests.mini.build import _version
from manifests.mini.grammar import Grammar, GrammarError, words_of
from manifests.mini.plan import plan
from manifests.mini.text import SIZES, TESTS, owner, sentences
from manifests.mini.voices import DEV_ONLY, KNOWN, UNSEEN

VERSION_AND_PLAN = ("4-c8bd31e8b7e4", "ed89b80785b4")
# Pairs that sound alike: only one of each may be used, else a right hypothesis could be counted as an error.
HOMOPHONES = """
    to two|to too|for four|ate eight|our hour|flower flour|sea see|no know|new knew|by buy|write right|hear here
    their there|its it's|your you're|wait weight|week weak|red read|blue blew|sun son|one won|meet meat|road rode
    wear where|pair pear|plane plain|sail sale|tail tale|be bee|break brake|hole whole|made maid|mail male|night knight
    piece peace|through threw|weather whether|which witch|pour poor|rose rows|rain reign|son sun|wood would|deer dear
    hair hare|sent cent|steel steal|board bored|war wore|hall haul|aunt ant|cheap cheep|i eye|past passed
""".split("\n")


@pytest.fixture(scope="module")
def text():
    return sentences(0)


@pytest.fixture(scope="module")
def train(text):
    return Counter(word for sentence in text["train"] for word in sentence.words)


def tokens(found):
    return [word for sentence in found for word in sentence.words]


def test_sizes(text):
    assert {subset: len(found) for subset, found in text.items()} == SIZES
    assert sum(len(text[subset]) for subset in TESTS) >= 300
    lengths = {len(sentence.words) for found in text.values() for sentence in found}
    assert min(lengths) >= 4 and max(lengths) <= 14


def test_no_sentence_twice(text):
    every = [sentence.words for found in text.values() for sentence in found]
    assert len(set(every)) == len(every)


def test_dev_and_known_tests_are_far_from_each_train_sentence(text):
    trained = [set(sentence.words) for sentence in text["train"]]
    for subset in ("dev", "test-known", "test-unseen-voices"):
        for sentence in text[subset]:
            missing = min(len(set(sentence.words) - other) for other in trained)
            assert missing >= max(2, len(sentence.words) / 3), sentence.text


def test_train_lexicon(train):
    assert 900 <= len(train) <= 1100
    assert sum(count >= 5 for count in train.values()) >= 500
    assert sum(count <= 6 for count in train.values()) >= 400  # words that teach spelling, not to be known by heart
    assert train.most_common(1)[0][1] < 0.08 * train.total()


def test_letters(text):
    letters = Counter(character for sentence in text["train"] for character in sentence.text)
    assert set(letters) == set(" abcdefghijklmnopqrstuvwxyz'")
    assert min(letters.values()) >= 36  # z, in words like zoo, lazy, dozen, prize
    for found in text.values():
        for sentence in found:
            assert re.fullmatch(r"[a-z']+( [a-z']+)*", sentence.text), sentence.text
            assert sentence.words == tuple(words_of(sentence.spoken))


def test_known_word_parts_hold_words_of_train_only(text, train):
    for subset in ("dev", "test-known", "test-unseen-voices"):
        assert min(train[word] for word in tokens(text[subset])) >= 12


@pytest.mark.parametrize("seed", [0, 1])
def test_new_words_are_a_tenth_of_the_test_tokens(seed):
    text = sentences(seed)
    train = Counter(tokens(text["train"]))
    every = [word for subset in TESTS for word in tokens(text[subset])]
    assert 0.095 <= sum(word not in train for word in every) / len(every) <= 0.105
    for sentence in text["test-new-words"]:
        new = [word for word in sentence.words if word not in train]
        assert 2 <= len(new) <= 3
        assert all(train[word] >= 12 for word in sentence.words if word not in new)


# What the new words are spelled with: endings, beginnings, vowels, clusters, doubled letters.
SPELLINGS = r"""
    ful$ ly$ ing$ (.)\1ing$ [^aeiou]er$ (.)\1er$ teen$ ty$ ^un [^aeiou]y$ (.)\1y$ [^aeious]s$ [^aeiou]es$ ies$ ed$ ers$
    ut$ ug$ um$ og$ ig$ en$ ent$ lt$ sk$ amp$ am$ ats?$ ets?$ ans?$ ills?$ op$ oa oo ake ee ar gs$ ocks?$
    ^sp ^st ^sw ^dr ^cl ^fr ^sl ^sm ^sn ^pl ^hu ^he ^pi ^ru ^be ^te ^de ^ca
""".split()


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_spellings_of_new_words_are_heard_in_other_words(train, spelling):
    new = Grammar("grammar.txt", "newwords.txt").vocabulary() - Grammar("grammar.txt").vocabulary()
    assert any(re.search(spelling, word) for word in new)
    heard = {word: count for word, count in train.items() if re.search(spelling, word)}
    assert len(heard) >= 5 and sum(heard.values()) >= 15, heard


@pytest.mark.parametrize("seed", [0, 1])
def test_no_new_word_is_in_train(seed):
    """Those of ``newwords.txt`` that no train frame can say are never said, at any scale, and are the new ones."""
    text = sentences(seed)
    may = Grammar("grammar.txt").vocabulary()
    new = {word for word in tokens(text["test-new-words"]) if word not in may}
    assert len(new) >= 80
    assert not new & set(tokens(text["train"])) and not new & set(tokens(text["dev"]))
    assert {word for word in tokens(text["test-new-words"])} - set(tokens(text["train"])) == new


def made_of_known_parts(word: str, train) -> bool:
    """Whether ``word`` is an inflection, a derivation or a compound of train words."""
    endings = "s es ed d ing er r ers est st ly y ful ness ty teen ist less".split()
    stems = [word[: -len(end)] for end in endings if word.endswith(end)] + [word.removeprefix("un")]
    for stem in stems:
        forms = {stem, stem + "e", stem[:-1] if stem[-2:-1] == stem[-1:] else stem, re.sub("i$", "y", stem)}
        forms |= {form + end for form in forms for end in ("s", "es", "ed", "d", "er")}  # "runs" for "runner"
        if any(form in train and form != word for form in forms):
            return True
    halves = [(word[:i], word[i:]) for i in range(3, len(word) - 2)]
    known = set(train) | {form.removesuffix("s") for form in train}
    return any(first in known and (second in known or second.removesuffix("s") in known) for first, second in halves)


def test_most_new_words_are_made_of_parts_that_train_has(text, train):
    new = Counter(word for word in tokens(text["test-new-words"]) if word not in train)
    assert len(new) >= 100
    made = sum(count for word, count in new.items() if made_of_known_parts(word, train))
    assert 0.5 <= made / new.total() <= 0.8
    assert made_of_known_parts("gardener", train) and not made_of_known_parts("tent", train)


def test_no_homophones(text):
    used = {word for found in text.values() for sentence in found for word in sentence.words}
    pairs = [pair.split() for line in HOMOPHONES for pair in line.strip().split("|") if pair]
    assert [pair for pair in pairs if set(pair) <= used] == []


def test_agreement(text):
    """Slips that a grammar of slots makes easily."""
    slips = [
        r"\b(this|that|a|an|each|every) \w+(ets|rrors|amps|hairs|ocks|oots|oes|oves)\b",
        r"\b(these|those) (hotel|lamp|chair|book|clock|cow|horse|field|barn)\b",
        r"\b(he|she) (are|were|have|do|don't)\b",
        r"\b(they|we|you) (is|was|has|does)\b",
        r"\ban [^aeiou]|\ba [aeiou]",
        r"\bi (gave|brought|showed|poured) (me|us)\b",
        r"\b(\w+) \1\b",
    ]
    every = [sentence.text for found in text.values() for sentence in found]
    assert [(slip, line) for slip in slips for line in every if re.search(slip, line)] == []


def test_text_follows_from_the_seed():
    first = sentences(1)
    sentences.cache_clear()
    assert sentences(1) == first
    assert not set(sentences(0)["train"]) >= set(first["train"])


def test_scale_cuts_or_adds():
    full, small, large = sentences(0), sentences(0, 0.05), sentences(0, 1.2)
    for subset in SIZES:
        assert small[subset] == full[subset][: len(small[subset])] and small[subset]
        assert large[subset][: len(full[subset])] == full[subset]
    assert len(large["train"]) == round(1.2 * SIZES["train"])
    held = [(sentence.words, set(sentence.words)) for subset in list(SIZES)[1:4] for sentence in full[subset]]
    for sentence in large["train"]:
        assert all(len(words - set(sentence.words)) >= max(2, len(line) / 3) for line, words in held)


def test_voices():
    speakers = [voice.speaker for voice in KNOWN + DEV_ONLY + UNSEEN]
    assert len(set(speakers)) == len(speakers)
    assert len({voice.espeak for voice in KNOWN + DEV_ONLY + UNSEEN}) == len(speakers)
    assert len(KNOWN) >= 16 and len(UNSEEN) >= 4 and len(DEV_ONLY) >= 2
    heard = {}
    for chapter in plan(0):
        heard.setdefault(chapter.subset, Counter())[chapter.voice] += len(chapter.jobs)
    assert set(heard["train"]) == set(heard["test-known"]) == set(heard["test-new-words"]) == set(KNOWN)
    assert set(heard["test-unseen-voices"]) == set(UNSEEN)
    assert set(DEV_ONLY) < set(heard["dev"]) and not set(UNSEEN) & set(heard["dev"])
    assert min(heard["train"].values()) >= 50
    assert {voice.sex for voice in KNOWN} == {voice.sex for voice in UNSEEN} == {"F", "M"}


def test_plan_ids_are_unique_and_do_not_depend_on_the_scale():
    full = {job["id"]: job for chapter in plan(0) for job in chapter.jobs}
    assert len(full) == sum(SIZES.values())
    small = {job["id"]: job for chapter in plan(0, 0.05) for job in chapter.jobs}
    assert small and all(full[utterance] == job for utterance, job in small.items())
    assert len({chapter.number for chapter in plan(0)}) == len(plan(0))


def test_version_is_raised_when_the_plan_changes():
    """The mark of a complete tree holds VERSION: a changed plan under an old number would pass for the old corpus."""
    digest = hashlib.sha256(json.dumps([chapter.jobs for chapter in plan(0)]).encode()).hexdigest()[:12]
    assert (_version(), digest) == VERSION_AND_PLAN, "raise VERSION in build.py, or put the new pair here"


def test_owner():
    assert owner("anna lost OWN keys".split()) == "her"
    assert owner("anna and ben lost OWN keys".split()) == "their"
    assert owner("last week i lost OWN keys".split()) == "my"
    assert owner("my uncle lost OWN keys".split()) == "his"


@pytest.mark.parametrize(
    "rules, message",
    [
        ("A = x\n* the {B}\n", "class {B} in 'the {B}'"),
        ("A = x\nA = y\n", "bad.txt:2: class A is defined twice"),
        ("* a (b|c\n", "stray '(' in 'a (b|c'"),
        ("nonsense\n", "bad.txt:1: neither a class, a frame nor a comment: 'nonsense'"),
    ],
)
def test_bad_rule_file(tmp_path, monkeypatch, rules, message):
    monkeypatch.setattr("manifests.mini.grammar.HERE", tmp_path)
    (tmp_path / "bad.txt").write_text(rules)
    with pytest.raises(GrammarError, match=re.escape(message)):
        Grammar("bad.txt")
