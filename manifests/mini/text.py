"""The sentences of the embedded corpus: which ones are in train, dev and the three test parts.

Train is drawn so that each word comes up about as often as it is wanted, and so that no word passes its cap: words that
dev or a test may hold ``WANTED`` times, the others, which are there for their spelling, ``HEARD`` times. Dev and test
sentences come from the same grammar, use only words that train has at least ``KNOWN`` times (English spelling has to be
heard to be learned; what a model does with words it never heard is what the third test part asks), and share at most
two thirds of their words with any one train sentence. The sentences of ``test-new-words`` have frames of their own
(``newwords.txt``), in which two or three words are never in train.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache

from manifests.mini.grammar import Grammar, words_of

SIZES = {"train": 1300, "dev": 150, "test-known": 115, "test-unseen-voices": 115, "test-new-words": 120}
TESTS = ("test-known", "test-unseen-voices", "test-new-words")
SHORTEST, LONGEST = 4, 14  # words
CAPS = {"the": 0.077, "a": 0.06}  # largest share of the train tokens; other words: CAP
CAP = 0.04
KNOWN = 12  # a word of dev or a test is in train at least this often, the new words excepted
WANTED, HEARD = 15, 6  # how often a word is wanted in train: of those that dev or a test may hold, of the others
URGENCY = 2.4  # how much more a missing word of the first kind counts than one of the second
NEW_RARITY = 2.5  # the same among the new words, which should come up about equally often
NEW_SHARE = 0.10  # words never in train, of all test tokens
CANDIDATES = 64  # expansions that compete for each place in train
REPEATABLE = frozenset("the a an and to in on of is was".split())
CLASHES = ({"i", "me"}, {"i", "us"}, {"we", "us"}, {"we", "me"})  # "i gave me"
OWN = "OWN"  # in a frame: the possessive of the first person named
OWNER = {"i": "my", "we": "our", "they": "their", "you": "your", "he": "his", "she": "her"}
WOMEN = frozenset("anna emma grace kate lucy aunt grandmother mother sister".split())
MEN = frozenset(
    "ben felix jack martin oliver quentin tom victor brother father uncle farmer grandfather grandson".split()
)


@dataclass(frozen=True)
class Sentence:
    """``spoken``: with punctuation, for the synthesizer; ``words``: the transcript, lower case."""

    spoken: str
    words: tuple[str, ...]

    @property
    def text(self) -> str:
        return " ".join(self.words)


def owner(words: list[str]) -> str:
    """The possessive that fits the first person in ``words``: "anna" her, "anna and ben" their, "i" my."""
    for i, word in enumerate(words):
        if word in OWNER or word in WOMEN or word in MEN:
            if words[i + 1 : i + 2] == ["and"]:
                return "their"
            return OWNER.get(word) or ("her" if word in WOMEN else "his")
    return "the"


def draw(grammar: Grammar, frame: str, rng: random.Random) -> Sentence | None:
    """One acceptable sentence of ``frame``, or None when this draw says a word twice or is too short or long."""
    spoken = grammar.expand(frame, rng)
    words = words_of(spoken)
    if OWN in spoken:
        spoken = spoken.replace(OWN, owner(words))
        words = words_of(spoken)
    if not SHORTEST <= len(words) <= LONGEST:
        return None
    content = [word for word in words if word not in REPEATABLE]
    if len(set(content)) < len(content) or any(clash <= set(words) for clash in CLASHES):
        return None
    return Sentence(spoken, tuple(words))


def needed_difference(words: tuple[str, ...]) -> int:
    """How many words of a dev or test sentence may at least not be in any one train sentence: a third, at least two."""
    return max(2, -(-len(words) // 3))


class _Drawer:
    """Draws sentences and remembers which were taken."""

    def __init__(self, grammar: Grammar, seed: int):
        self.grammar, self.rng = grammar, random.Random(f"mini-text-{seed}")
        self.taken: set[tuple[str, ...]] = set()
        self.bits: dict[str, int] = {}  # a bit for each word, so that two sentences are compared in one step
        self.trained: list[int] = []  # the words of each train sentence
        self.held: list[tuple[int, int]] = []  # the same of dev and known-word tests, and the words they may share
        self.counts: Counter[str] = Counter()
        self.asked = Grammar("grammar.txt", "newwords.txt").vocabulary(train_only=False)

    def train(self, count: int) -> list[Sentence]:
        """``count`` new train sentences: of several candidates the one whose words are wanted most."""
        out: list[Sentence] = []
        total = sum(self.counts.values())
        while len(out) < count:
            best, best_score = None, float("-inf")
            for _ in range(CANDIDATES):
                sentence = draw(self.grammar, self._train_frame(), self.rng)
                if sentence is None or sentence.words in self.taken or self._over_cap(sentence.words, total):
                    continue
                score = sum(self._want(word) for word in sentence.words)
                if score > best_score:
                    best, best_score = sentence, score
            if best is not None:
                mask = self._mask(best.words)
                if any((mask & held).bit_count() > shared for held, shared in self.held):
                    continue  # scale > 1: dev and test were drawn before
                out.append(best)
                self.taken.add(best.words)
                self.counts.update(best.words)
                self.trained.append(mask)
                total += len(best.words)
        return out

    def _frame(self) -> str:
        return self.grammar.frames[int(self.rng.random() * len(self.grammar.frames))]

    def _train_frame(self) -> str:
        """One of the frames of all subsets or, as often, one of those of train alone."""
        if self.rng.random() < 0.5:
            return self._frame()
        return self.grammar.train_only[int(self.rng.random() * len(self.grammar.train_only))]

    def _want(self, word: str) -> float:
        """From ``URGENCY`` or 1 for a word that train does not have yet down to 0 for one that it has often enough."""
        if word in self.asked:
            return URGENCY * max(0.0, 1 - self.counts[word] / WANTED)
        return max(0.0, 1 - self.counts[word] / HEARD)

    def _over_cap(self, words: tuple[str, ...], total: int) -> bool:
        if total < 500:  # shares mean nothing yet
            return words.count("the") > 1
        total += len(words)
        for word in words:
            if self.counts[word] + words.count(word) > CAPS.get(word, CAP) * total:
                return True
        return False

    def _mask(self, words: tuple[str, ...]) -> int:
        mask = 0
        for word in words:
            mask |= self.bits.setdefault(word, 1 << len(self.bits))
        return mask

    def held_out(self, count: int) -> list[Sentence]:
        """``count`` sentences of known words, each far enough from every train sentence."""
        out: list[Sentence] = []
        used: Counter[str] = Counter()  # words and frames
        while len(out) < count:
            frames = [min((self._frame() for _ in range(3)), key=used.__getitem__) for _ in range(4)]
            drawn = [(frame, draw(self.grammar, frame, self.rng)) for frame in frames]
            fit = [(frame, s) for frame, s in drawn if s and self._is_held_out(s)]
            if fit:
                frame, best = min(fit, key=lambda f: sum(used[word] for word in f[1].words) / len(f[1].words))
                used.update([frame, *best.words])
                self.taken.add(best.words)
                self.held.append((self._mask(best.words), len(set(best.words)) - needed_difference(best.words)))
                out.append(best)
        return out

    def knows(self, sentence: Sentence, new: list[str]) -> bool:
        """Whether train has every word but ``new`` at least ``KNOWN`` times."""
        return all(self.counts[word] >= KNOWN for word in sentence.words if word not in new)

    def _is_held_out(self, sentence: Sentence) -> bool:
        if sentence.words in self.taken or not self.knows(sentence, []):
            return False
        mask, shared = self._mask(sentence.words), len(set(sentence.words)) - needed_difference(sentence.words)
        return all((mask & other).bit_count() <= shared for other in self.trained)


@lru_cache(maxsize=4)
def sentences(seed: int = 0, scale: float = 1.0) -> dict[str, tuple[Sentence, ...]]:
    """All sentences by subset. ``scale`` > 1 adds train sentences; below 1 each subset is cut to its first ones.

    The dev and test sentences depend on the seed only, so results at any scale of at least 1 are comparable.
    """
    drawer = _Drawer(Grammar("grammar.txt"), seed)
    out = {"train": drawer.train(SIZES["train"])}
    for subset in ("dev", "test-known", "test-unseen-voices"):
        out[subset] = drawer.held_out(SIZES[subset])
    known_tokens = sum(len(sentence.words) for subset in TESTS[:2] for sentence in out[subset])
    out["test-new-words"] = new_word_sentences(drawer, seed, known_tokens)
    if scale > 1:
        out["train"] += drawer.train(round(SIZES["train"] * (scale - 1)))
    keep = {subset: max(1, round(SIZES[subset] * scale)) for subset in SIZES}
    return {subset: tuple(found[: keep[subset]]) for subset, found in out.items()}


def new_word_sentences(drawer: _Drawer, seed: int, known_tokens: int) -> list[Sentence]:
    """The sentences of ``newwords.txt``: each new word about as often as the others, two or three a sentence.

    ``known_tokens``: tokens of the other test parts; with them, new words are ``NEW_SHARE`` of all test tokens.
    """
    grammar = Grammar("grammar.txt", "newwords.txt")
    frames = grammar.frames[len(drawer.grammar.frames) :]
    vocabulary = drawer.grammar.vocabulary()
    rng = random.Random(f"mini-new-words-{seed}")
    used: Counter[str] = Counter()
    out: list[Sentence] = []
    tokens = known_tokens
    while len(out) < SIZES["test-new-words"]:
        best, best_score, best_new = None, -1.0, []
        for _ in range(CANDIDATES):
            sentence = draw(grammar, frames[int(rng.random() * len(frames))], rng)
            if sentence is None or sentence.words in drawer.taken:
                continue
            new = [word for word in sentence.words if word not in vocabulary]
            # The last of these sentences brings the share to NEW_SHARE; on the way it rises in proportion.
            wanted = NEW_SHARE * (known_tokens / SIZES["test-new-words"] * (len(out) + 1) + tokens - known_tokens)
            if len(new) != (3 if used.total() + 3 <= wanted else 2) or not drawer.knows(sentence, new):
                continue
            score = sum((1 + used[word]) ** -NEW_RARITY for word in new) / len(new)
            if score > best_score:
                best, best_score, best_new = sentence, score, new
        if best is None:
            continue
        used.update(best_new)
        tokens += len(best.words)
        drawer.taken.add(best.words)
        out.append(best)
    return out
