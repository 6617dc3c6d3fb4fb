"""toyworld's world: its words, the grammar nodes, the facts drawn from a seed, and the sentences that state them.

    from data.toyworld import World                    # data/toyworld.py writes and reads the documents
    world = World(seed=0, people=200, towns=40)
    world.facts[0], world.held_out[0], world.grammar.nats / world.grammar.tokens

To add a fact: draw it in _draw_people or _draw_towns, list it in World.facts, say it in person_sentences or
town_sentences, add new words to a word list. Keep to one rule: at a Choice, no option's text may begin another
option's text; then every text has one reading (tests/test_toyworld.py proves it for whole worlds).
Only random() of Python's generator is used and no set is iterated: equal seeds give equal bytes everywhere.
"""

from __future__ import annotations

import functools
import math
import random
from dataclasses import dataclass
from itertools import accumulate
from typing import Sequence, Union

# ---- word lists: fixed, so that the tokenizer does not depend on the seed -------------------------------------

WOMEN = """Adela Berit Corina Delfa Elsin Fenna Gisla Hedda Ilva Jorun Kaira Linnea Mirel Nadia Orsola Petra Runa
    Signe Tilda Wenda""".split()
MEN = """Alrik Bastian Conrad Dorian Edvin Florian Gregor Havel Ivo Jannis Kaspar Lorin Matteo Niklas Oskar Pavel
    Rurik Stellan Tomas Viktor""".split()
FAMILIES = """Abend Ahlert Bakkor Belling Brandis Carlow Castor Dahlke Dorn Drexel Eklund Engberg Falk Ferrow Forsby
    Garland Gerlach Hagen Halvor Hessel Holm Jarnow Jessen Kessel Kolbe Krantz Lanner Lindqvist Lorenz Madsen Mertens
    Nagel Norring Olsen Orlov Prell Quist Reuter Sander Selby Sorel Stahl Tamm Ulrich Varga Vogel Wendel Yorke Zander
    Zeller""".split()
TOWNS = """Alderby Amberton Ashmoor Barrowick Belford Birkham Blackmere Brinsted Caldwick Carnby Coldham Cransted
    Dalmoor Deepford Dunwick Eastmere Elmham Fairby Farnsted Fenwick Glenmoor Granby Greyford Halsted Harwick Hexham
    Holmby Ironford Kelmere Kirkby Langham Larkmoor Lindham Lowick Marsted Millby Mossford Netherby Norwick Oakham
    Oxmere Pendle Pinsted Quarrby Ravenham Redford Rushmere Saltby Sandwick Selham Stonemoor Swanby Thornham
    Tideford Ulmere Wansted Westby Whitwick Wolmoor Yarham""".split()
RIVERS = "Arvel Brenna Corve Dessel Esker Lorne Nidda Orrin Tarne Wyle".split()
OFFICES = "mayor judge bishop astronomer treasurer abbot engineer librarian surveyor apothecary".split()
SUBJECTS = "law music botany grammar algebra painting".split()
GOODS = "wool salt honey timber glass leather barley copper paper cheese".split()
YEARS = [str(year) for year in range(1701, 1801)]
NUMBERS = "one two three four five six seven eight nine".split()
SEASONS = "spring summer autumn winter".split()
SIDES = "north east south west".split()
TEMPERS = "quiet honest stubborn able generous proud impatient gentle".split()
MANNERS = "careful witty modest bold strict curious tireless cheerful".split()
ROLES = "speaker writer neighbour traveller gardener singer".split()
LOOKS = "small old handsome crowded remote quiet busy orderly".split()
FINE = "fine coarse rare cheap excellent famous".split()
SKIES = "mild wet dry cold long windy icy pleasant".split()
TROUBLES = "flood fire siege famine plague war".split()
LENGTHS = "short long sudden painful".split()
OFTEN = "often seldom sometimes once twice never".split()
GRAMMAR_WORDS = """She He she he It it The the In in a an and as of on to from with for after which who where
    was is are lies born died served became married wife husband had they taught learned teacher pupil known
    travelled town towns other shares its received charter trades birthplace mile miles has illness bridge
    crosses water daughter daughters son sons children companions""".split()
END = "<|endoftext|>"  # the last word of every document: it says that the document is over, and is counted as a token
LEXICON = list(dict.fromkeys(  # in order of first use: " quiet" and " long" stand in two lists and are one word
    WOMEN + MEN + FAMILIES + TOWNS + RIVERS + OFFICES + SUBJECTS + GOODS + YEARS + NUMBERS + SEASONS + SIDES + TEMPERS
    + MANNERS + ROLES + LOOKS + FINE + SKIES + TROUBLES + LENGTHS + OFTEN + GRAMMAR_WORDS + [".", ","]))
KNOWN = frozenset(LEXICON + [END])

# ---- grammar nodes: each carries the exact expectation of its nats and of its tokens --------------------------


class Leaf:
    """Fixed words, with the entity label they carry (PER, TOWN, RIVER, OFFICE, YEAR) or None."""

    def __init__(self, text: str, label: str | None = None):
        self.words, self.label = tuple(text.split()), label
        self.nats, self.tokens = 0.0, float(len(self.words))
        if unknown := [word for word in self.words if word not in KNOWN]:
            raise ValueError(f"not in toyworld's lexicon: {unknown}")


class Seq:
    """Parts one after the other."""

    def __init__(self, parts: Sequence[Node]):
        self.parts = tuple(parts)
        self.nats = math.fsum(part.nats for part in parts)
        self.tokens = math.fsum(part.tokens for part in parts)


class Choice:
    """One of several options, drawn with probabilities proportional to weights (default: all equal)."""

    def __init__(self, options: Sequence[Node], weights: Sequence[float] | None = None):
        weights = weights or [1.0] * len(options)
        total = math.fsum(weights)  # not sum(): its rounding changed with Python 3.12
        self.options, self.probs = tuple(options), tuple(weight / total for weight in weights)
        self.bounds = tuple(accumulate(self.probs))[:-1]  # option i is drawn by a number in [bounds[i-1], bounds[i])
        self.nats = math.fsum(p * (option.nats - math.log(p)) for p, option in zip(self.probs, options))
        self.tokens = math.fsum(p * option.tokens for p, option in zip(self.probs, options))


Node = Union[Leaf, Seq, Choice]


def seq(*parts: str | Node) -> Seq:
    """Parts in order; a string stands for its words."""
    return Seq([Leaf(part) if isinstance(part, str) else part for part in parts])


def one_of(*options: str | Node, weights: Sequence[float] | None = None) -> Choice:
    return Choice([Leaf(option) if isinstance(option, str) else option for option in options], weights)


def free(words: Sequence[str]) -> Choice:
    """A word that nothing determines; frequencies fall with rank as in real text."""
    return one_of(*words, weights=[0.6 ** rank for rank in range(len(words))])


def free_with_article(words: Sequence[str]) -> Choice:
    """As `free`, with "a" or "an" before it, as the word wants."""
    return free([f"{article(word)} {word}" for word in words])


def article(word: str) -> str:
    return "an" if word[0] in "aeiou" or word == "honest" else "a"


def in_any_order(first: list[Node], later: list[Node], weights: list[float], least: int = 4, stop: float = 0.2) -> Node:
    """Sentences drawn without replacement; after the `least`-th, the document may END before each further one.

    first[k] is sentence k as it reads at the document's beginning, later[k] as it reads further on. The rest of a
    document depends only on which sentences are left, so that there is one node per subset (a bit mask of them)."""

    @functools.lru_cache(maxsize=None)
    def rest(left: int) -> Node:
        kinds = [k for k in range(len(later)) if left >> k & 1]
        may_stop = len(later) - len(kinds) >= least
        if not kinds:
            return Leaf(END)
        options = [Seq([later[k], rest(left & ~(1 << k))]) for k in kinds]
        total = math.fsum(weights[k] for k in kinds)
        shares = [weights[k] / total for k in kinds]
        if not may_stop:
            return Choice(options, shares)
        return Choice([Leaf(END)] + options, [stop] + [(1 - stop) * share for share in shares])

    everything = (1 << len(later)) - 1
    return Choice([Seq([first[k], rest(everything & ~(1 << k))]) for k in range(len(later))], weights)


# ---- the world: facts drawn from the seed ---------------------------------------------------------------------


@dataclass(eq=False)
class Town:
    name: str
    river: str
    charter: str
    goods: tuple[str, str]
    side: str = ""  # the town lies `miles` miles to the `side` of `neighbour`
    miles: str = ""
    neighbour: Town | None = None


@dataclass(eq=False)
class Person:
    given: str
    family: str
    woman: bool
    born: int
    born_in: Town  # the same for a whole family
    office: str
    office_in: Town  # the same for all who hold the office
    since: int  # everybody takes office at the age of 30
    died_in: Town  # where they were born or where they served
    spouse: Person | None = None
    teacher: Person | None = None  # everybody is either one person's teacher or one person's pupil, except one
    pupil: Person | None = None  # who is left over when the number of people is odd
    subject: str = ""  # taught or learned; follows from the teacher's office
    held_out: bool = False  # the pair is only ever stated as "teacher ... pupil", never as "pupil ... teacher"

    @property
    def name(self) -> str:
        return f"{self.given} {self.family}"


class World:
    """Everything there is, a pure function of its arguments. ValueError outside 2..1000 people, 2..60 towns.

    people, towns: lists of Person and Town; facts: list of (subject, relation, object) strings;
    held_out: the (teacher, pupil) names stated in one order only; grammar: the distribution of documents.
    single: a document is a single sentence, and who teaches whom is drawn without regard to age. So the names of a
    pair meet in the order of the sentences that state it and nowhere else, and nothing else tells who belongs to whom;
    in documents of several sentences the first name may come again after the second one."""

    def __init__(self, seed: int, people: int = 200, towns: int = 40, single: bool = False):
        if not 2 <= people <= 1000:
            raise ValueError(f"toyworld can hold 2 to 1000 people, not {people}")
        if not 2 <= towns <= len(TOWNS):
            raise ValueError(f"toyworld can hold 2 to {len(TOWNS)} towns, not {towns}")
        self.seed, self.single = seed, single
        rng = random.Random(f"toyworld {seed} {people} {towns}")
        self.towns = _draw_towns(rng, towns)
        self.people = _draw_people(rng, people, self.towns, by_age=not single)
        self.held_out = [(p.name, p.pupil.name) for p in self.people if p.pupil and p.held_out]

    @property
    def facts(self) -> list[tuple[str, str, str]]:
        found = []
        for p in self.people:
            found += [(p.name, "born in", p.born_in.name), (p.name, "born in year", str(p.born)),
                      (p.name, "office", p.office), (p.name, "office in", p.office_in.name),
                      (p.name, "office since", str(p.since)), (p.name, "died in", p.died_in.name)]
            if p.spouse:
                found.append((p.name, "spouse", p.spouse.name))
            if p.pupil:
                found += [(p.name, "teacher of", p.pupil.name), (p.name, "taught", p.subject)]
        for t in self.towns:
            found += [(t.name, "on river", t.river), (t.name, "charter in year", t.charter),
                      (t.name, "goods", " ".join(t.goods)), (t.name, "neighbour", t.neighbour.name),
                      (t.name, "side of neighbour", t.side), (t.name, "miles to neighbour", t.miles)]
        return found

    @functools.cached_property
    def journey_end(self) -> Choice:
        """Any town, with or without its river: a free draw that determines a fact right after it."""
        return Choice([seq(_town(town), one_of(
            ".", seq(", which lies on the", _river(town), "."), seq("with", free(NUMBERS[1:]), "companions ."),
            weights=[0.4, 0.4, 0.2])) for town in self.towns])

    @functools.cached_property
    def grammar(self) -> Choice:
        """The distribution of documents: three of four are about a person, one about a town."""
        people = [self._entry(person_sentences, p) for p in self.people]
        towns = [self._entry(town_sentences, t) for t in self.towns]
        return one_of(Choice(people), Choice(towns), weights=[3, 1])

    def _entry(self, sentences, about: Person | Town) -> Node:
        weights, first = zip(*sentences(self, about, True).values())
        if self.single:
            return Choice([seq(sentence, END) for sentence in first], weights)
        return in_any_order(list(first), [node for _, node in sentences(self, about, False).values()], list(weights))


def _below(rng: random.Random, n: int) -> int:
    """A whole number in [0, n) by random() alone, whose stream is the same in every Python version."""
    return int(rng.random() * n)


def _any(rng: random.Random, items: Sequence):
    return items[_below(rng, len(items))]


def _shuffled(rng: random.Random, items: Sequence) -> list:
    items = list(items)
    for i in range(len(items) - 1, 0, -1):
        j = _below(rng, i + 1)
        items[i], items[j] = items[j], items[i]
    return items


def _draw_towns(rng: random.Random, count: int) -> list[Town]:
    towns = [Town(name, _any(rng, RIVERS), _any(rng, YEARS), tuple(_shuffled(rng, GOODS)[:2]))
             for name in _shuffled(rng, TOWNS)[:count]]
    for i, town in enumerate(towns):
        town.neighbour = towns[(i + 1 + _below(rng, count - 1)) % count]
        town.side, town.miles = _any(rng, SIDES), _any(rng, NUMBERS)
    return towns


def _draw_people(rng: random.Random, count: int, towns: list[Town], by_age: bool) -> list[Person]:
    """People in random order. A family shares its birth town, an office its town and subject, so that there is
    something to generalise and less to learn by heart (a small model learns such a world markedly sooner); the rest
    is drawn for each person."""
    home = {family: _any(rng, towns) for family in FAMILIES}
    seat = {office: _any(rng, towns) for office in OFFICES}
    subject = {office: _any(rng, SUBJECTS) for office in OFFICES}
    people, taken = [], {}
    while len(people) < count:
        woman = len(people) % 2 == 0
        given, family = _any(rng, WOMEN if woman else MEN), _any(rng, FAMILIES)
        if (given, family) in taken:
            continue
        taken[given, family] = True
        born, office = 1701 + _below(rng, 50), _any(rng, OFFICES)
        died_in = home[family] if rng.random() < 0.5 else seat[office]
        people.append(Person(given, family, woman, born, home[family], office, seat[office], born + 30, died_in))
    people.sort(key=lambda p: p.born)  # by age: couples are of like age, teachers a generation older than pupils
    for wife, husband in zip([p for p in people if p.woman], [p for p in people if not p.woman]):
        if rng.random() < 0.8 and abs(wife.born - husband.born) <= 10:
            wife.spouse, husband.spouse = husband, wife
    younger = people[count // 2:] if by_age else _shuffled(rng, people[count // 2:])
    pairs = list(zip(people[:count // 2], younger))
    for i, (teacher, pupil) in enumerate(_shuffled(rng, pairs)):
        teacher.pupil, pupil.teacher = pupil, teacher
        teacher.subject = pupil.subject = subject[teacher.office]
        teacher.held_out = pupil.held_out = i % 2 == 0
    return _shuffled(rng, people)


# ---- sentences ------------------------------------------------------------------------------------------------


def _per(person: Person) -> Leaf:
    return Leaf(person.name, "PER")


def _town(town: Town) -> Leaf:
    return Leaf(town.name, "TOWN")


def _river(town: Town) -> Leaf:
    return Leaf(town.river, "RIVER")


def _year(year: int | str) -> Leaf:
    return Leaf(str(year), "YEAR")


# An optional part always includes the punctuation that follows it: so no option's text begins another option's text.


def person_sentences(world: World, p: Person, first: bool) -> dict[str, tuple[float, Node]]:
    """{kind: (weight, sentence)}; a person's first sentence gives the full name, later ones refer back to it."""
    office, family = Leaf(p.office, "OFFICE"), Leaf(p.family, "PER")
    Who, who = _per(p), _per(p)
    if not first:
        Who = one_of("She" if p.woman else "He", family, seq("The", office), _per(p), weights=[0.5, 0.25, 0.1, 0.15])
        who = one_of("she" if p.woman else "he", family, weights=[0.6, 0.4])

    where = _town(p.born_in)
    aside = seq(",", free_with_article(LOOKS), "town on the", _river(p.born_in))
    birth = one_of(seq(where, one_of("in", seq(aside, ", in"), weights=[0.7, 0.3]), _year(p.born), "."),
                   seq(_year(p.born), "in", where, "."))
    ending = one_of(".", seq("after a", free(LENGTHS), "illness ."), seq(", which lies on the", _river(p.died_in), "."))
    found = {"birth": (4, seq(Who, "was born in", birth)),
             "office": (3, one_of(
                 seq(Who, "served as", office, "of", _town(p.office_in), "from", _year(p.since), "."),
                 seq(Who, "was", free_with_article(TEMPERS), office, "in", _town(p.office_in), "."),
                 seq("In", _year(p.since), who, "became", office, "of", _town(p.office_in),
                     one_of(".", seq(", which lies on the", _river(p.office_in), "."), weights=[0.7, 0.3])))),
             "death": (1.5, seq(Who, "died in", _town(p.died_in), ending)),
             "character": (1.5, seq(Who, "was known as", free_with_article(TEMPERS), "and", free(MANNERS), free(ROLES),
                                    ".")),
             "travel": (1.5, seq(Who, free(OFTEN), "travelled to", world.journey_end))}
    if p.spouse:
        family_size = one_of(seq("one", free(["daughter", "son"])),
                             seq(free(NUMBERS[1:]), free(["daughters", "sons", "children"])), weights=[0.3, 0.7])
        children = one_of(".", seq(", and they had", family_size, "."))
        bond = one_of("married", f"was the {'wife' if p.woman else 'husband'} of")
        found["marriage"] = (2, seq(Who, bond, _per(p.spouse), children))
    if p.pupil:
        found["lesson"] = (3, one_of(
            seq(Who, "was the teacher of", _per(p.pupil), one_of(
                ".", seq(", who was", free_with_article(TEMPERS), "pupil ."), weights=[0.7, 0.3])),
            seq(Who, "taught", p.subject, "to", _per(p.pupil), "."), weights=[0.7, 0.3]))
    if p.teacher and not p.held_out:
        found["lesson"] = (3, one_of(seq(Who, "was a pupil of", _per(p.teacher), "."),
                                     seq(Who, "learned", p.subject, "from", _per(p.teacher), "."), weights=[0.7, 0.3]))
    return found


def town_sentences(world: World, t: Town, first: bool) -> dict[str, tuple[float, Node]]:
    """{kind: (weight, sentence)}; a town's first sentence gives its name, later ones refer back to it."""
    What = _town(t) if first else one_of("The town", "It", _town(t), weights=[0.4, 0.3, 0.3])
    what = _town(t) if first else one_of("the town", "it")
    trouble = one_of(".", seq("after a", free(SKIES), free(TROUBLES), "."))
    bridge = one_of(".", seq(", where", free_with_article(LOOKS), "bridge crosses the water ."), weights=[0.7, 0.3])
    seasons = [seq(season, "and", free_with_article(SKIES), free([s for s in SEASONS if s != season]))
               for season in SEASONS]
    found = {"river": (4, seq(What, one_of(seq("lies on the", _river(t)),
                                           seq("is", free_with_article(LOOKS), "town on the", _river(t))), bridge)),
             "charter": (2, one_of(seq(What, "received its charter in", _year(t.charter), trouble),
                                   seq("In", _year(t.charter), what, "received its charter", trouble))),
             "trade": (2, seq(What, one_of("trades in", "is known for its"), free(FINE), f"{t.goods[0]} and",
                              t.goods[1], ".")),
             "neighbour": (2, seq(What, "lies", t.miles, "mile" if t.miles == "one" else "miles", t.side, "of",
                                  _town(t.neighbour), ".")),
             "weather": (1, seq(What, "has", free_with_article(SKIES), Choice(seasons), "."))}
    sisters = [s for s in world.towns if s.river == t.river and s is not t]
    if sisters:
        parts = [_town(sisters[0])]
        for i, sister in enumerate(sisters[1:], 2):
            parts += ["and" if i == len(sisters) else ",", _town(sister)]
        shares = seq(What, "shares the", _river(t), "with", *parts, ".")
        number = ("The other town on the", "is") if len(sisters) == 1 else ("The other towns on the", "are")
        found["sisters"] = (1.5, shares if first else one_of(shares, seq(number[0], _river(t), number[1], *parts, ".")))
    natives = [p for p in world.people if p.born_in is t]
    if natives:
        found["native"] = (2, seq(What, "is the birthplace of", Choice(
            [one_of(seq(_per(p), ", born in", _year(p.born)), seq("the", Leaf(p.office, "OFFICE"), _per(p)))
             for p in natives]), "."))
    holders = [p for p in world.people if p.office_in is t]
    if holders:
        found["holder"] = (2, seq(What, "had", Choice(
            [seq(_per(p), "as its", Leaf(p.office, "OFFICE"), "from", _year(p.since)) for p in holders]), "."))
    return found
