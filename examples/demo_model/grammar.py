"""A grammar that writes small English stories: rules with alternatives, expanded at random around a cast.

In a rule `[one|two|[three|four]]` is one of its alternatives and `{hero}` is a value of the cast or the plot. What is
in the rules themselves lies in plots.py and talk.py; here is how they are expanded, and who may play in them.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_INNERMOST = re.compile(r"\[([^\[\]]*)\]")


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


# Whom a story may be asked for about. The first are drawn more often.
KINDS = _words(
    "fox bear rabbit mouse owl cat dog hedgehog frog duck squirrel turtle lion elephant otter badger wolf deer goat "
    "sheep horse cow pig hen bee whale dragon robot penguin crab snail kitten puppy girl boy giraffe monkey tiger zebra "
    "koala kangaroo parrot crow swan beaver mole bat seal dolphin octopus lizard camel donkey panda unicorn fairy giant "
    "wizard pirate knight princess ant spider butterfly ladybug lamb pony raccoon moose sparrow chick"
)
RARE_KINDS = _words(
    "alligator armadillo astronaut baker bird boat bull bunny captain car caterpillar chef chicken chipmunk clown cloud "
    "cricket crocodile detective dinosaur doctor dove dwarf eagle eel elf falcon farmer ferret fish flamingo fly gardener "
    "gecko ghost goblin goose gorilla grasshopper hamster hare hawk heron hippo iguana jaguar jellyfish king leopard llama "
    "lobster magpie mermaid minnow monster moth newt ostrich oyster painter peacock pelican pigeon pixie poodle "
    "prince queen rat raven reindeer rhino robin rooster sailor salmon scarecrow shark skunk sloth snake snowman squid "
    "star starfish stork teacher teapot toad toaster train tree troll turkey vampire vulture walrus wasp weasel witch "
    "wombat woodpecker worm yak"
)
FEMALE = ("girl", "princess", "hen", "cow", "fairy", "queen", "mermaid", "witch")
MALE = ("boy", "wizard", "knight", "pirate", "giant", "king", "prince", "snowman", "rooster", "bull")

HER_NAMES = _words(
    "Luna Mia Daisy Bella Lily Ruby Molly Poppy Rosie Nina Ivy Hazel Willow Ella Olive Tilly Clara Pearl Maya Penny Dora "
    "Zoe Fern Honey Kiki Lola Nora Sunny Tara Wendy Anna Emma Sara Lucy Amy Grace Ada Elsa Greta Frida "
    "Alice Mary Jane Susan Kate Rose Violet Iris Betty Ellie Chloe Sophie Hannah Julia Laura Maria Nelly Pippa Sally Tess "
    "Vera Zara Bonnie Coco Dolly Flora Gloria Heidi Ida Jenny Lena Mabel Nala Opal Peggy Roxy Stella Trixie Winnie"
)
HIS_NAMES = _words(
    "Pip Max Tom Leo Oliver Ben Sam Finn Toby Jack Milo Otto Bruno Felix Oscar Teddy Gus Hugo Rufus Barney Charlie Archie "
    "Bob Tim Rex Bobo Nico Paco Ziggy Wally Dan Jim Noah Luke Henry Fred George Alfie Theo Kit "
    "Peter Paul John James David Robert Adam Alex Andy Arthur Billy Bruce Chester Danny Eddie Ernie Frank Harry Ian Jasper "
    "Joe Kevin Larry Louis Marty Mike Ned Nick Nemo Patch Percy Ralph Ray Ricky Roger Rusty Sid Simon Spike Steve Ted "
    "Thomas Tommy Walter Will Winston Zack"
)
ADJECTIVES = "little/small/brave/kind/shy/clever/young/happy/curious/tiny/funny/sleepy/lonely/cheerful/gentle/lazy"
_PRONOUNS = ("she", "her", "him", "his", "they")
_ONSETS = _words(
    "b b c d d f g h j k k l l m m n n p p r r s s t t v w y z z bl br ch cl cr dr fl fr gl gr kr pl pr qu sh sk sl sm sn sp "
    "st sw th tr tw"
)
_VOWELS = _words("a a a e e i i i o o o u u ee oo ai ea ia ou")
_MIDDLES = _words(
    "b bb ck d dd f ff g gg k l ll lm lt m mb mp n nd nn nt p pp r rb rd rk rl rm rn rr s ss st t tt v x z zz"
)
_ENDS = _words("a a o o i y y ie us in el er ix on an ar en ella ert ina ino ette ax um is as")
_CODAS = ["", "", *_words("b ck d ff g k l ll m mp n nd nk p r rt s sh t x zz")]


@dataclass(frozen=True)
class Character:
    """Somebody in a story: name, kind, pronouns and what they are like."""

    name: str
    kind: str
    female: bool
    adjective: str

    def values(self, role: str) -> dict[str, str]:
        """The slots this character fills: {hero}, {hero_kind}, {hero_a}, {hero_adjective}, {he}, {him}, {his} (for a friend: {f_he}...)."""
        he, him, his = ("she", "her", "her") if self.female else ("he", "him", "his")
        prefix = "" if role == "hero" else "f_"
        values = {role: self.name, f"{role}_kind": self.kind, f"{role}_a": article(self.kind)}
        values[f"{role}_adjective"] = self.adjective
        for name, pronoun in (("he", he), ("him", him), ("his", his)):
            values[prefix + name] = pronoun
            values[prefix + name.capitalize()] = pronoun.capitalize()
        return values


def article(noun: str) -> str:
    """The noun behind its indefinite article: "a fox", "an owl", "a unicorn"."""
    return f"{'an' if noun[0] in 'aeio' else 'a'} {noun}"


def invented_word(rng: random.Random) -> str:
    """A word from nobody's list, so that a model has to copy and cannot only choose."""
    word = ""
    while len(word) < 3 or word in _PRONOUNS:
        word = ("" if rng.random() < 0.1 else rng.choice(_ONSETS)) + rng.choice(_VOWELS)
        for _ in range(rng.choice([0, 0, 0, 1])):
            word += rng.choice(_MIDDLES) + rng.choice(_VOWELS)
        word += rng.choice(_CODAS) if rng.random() < 0.4 else rng.choice(_MIDDLES) + rng.choice(_ENDS)
    return word


def character(rng: random.Random, other: Character | None = None, strange: bool = False) -> Character:
    """Somebody; never of the kind or the name of `other`. Of a `strange` one, six names in ten and every tenth kind are
    invented: that is for those whom a question names, since a model asked for nobody had better draw from what exists."""
    kind = name = None
    while kind is None or (other is not None and kind == other.kind):
        invented = strange and rng.random() < 0.1
        kind = invented_word(rng) if invented else rng.choice(KINDS if rng.random() < 0.65 else RARE_KINDS)
    female = kind in FEMALE or (kind not in MALE and rng.random() < 0.5)
    while name is None or (other is not None and name == other.name):
        invented = strange and rng.random() < 0.6
        name = invented_word(rng).capitalize() if invented else rng.choice(HER_NAMES if female else HIS_NAMES)
    return Character(name, kind, female, draw(rng, ADJECTIVES))


def expand(rule: str, values: Mapping[str, str], rng: random.Random) -> str:
    """One text of a rule. Raises KeyError for a slot that `values` does not fill."""
    while "[" in rule:
        rule = _INNERMOST.sub(lambda match: rng.choice(match[1].split("|")), rule)
    return rule.format_map(values)


def sentence_case(text: str) -> str:
    return text[:1].upper() + text[1:]


def draw(rng: random.Random, words: str | Sequence[str]) -> str:
    """One of the words between slashes."""
    return rng.choice(words.split("/") if isinstance(words, str) else words)
