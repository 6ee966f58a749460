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


# A story may be asked for with any of these; the ones with a vowel need "an".
KINDS = _words(
    "fox bear rabbit mouse owl cat dog hedgehog frog duck squirrel turtle lion elephant otter badger wolf deer goat "
    "sheep horse cow pig hen bee whale dragon robot penguin crab snail kitten puppy girl boy giraffe monkey tiger zebra "
    "koala kangaroo parrot crow swan beaver mole bat seal dolphin octopus lizard camel donkey panda unicorn fairy giant "
    "wizard pirate knight princess ant spider butterfly ladybug lamb pony raccoon moose sparrow chick"
)
FEMALE, MALE = ("girl", "princess", "hen", "cow", "fairy"), ("boy", "wizard", "knight", "pirate", "giant")

HER_NAMES = _words(
    "Luna Mia Daisy Bella Lily Ruby Molly Poppy Rosie Nina Ivy Hazel Willow Ella Olive Tilly Clara Pearl Maya Penny Dora "
    "Zoe Fern Honey Kiki Lola Nora Sunny Tara Wendy Anna Emma Sara Lucy Amy Grace Ada Elsa Greta Frida"
)
HIS_NAMES = _words(
    "Pip Max Tom Leo Oliver Ben Sam Finn Toby Jack Milo Otto Bruno Felix Oscar Teddy Gus Hugo Rufus Barney Charlie Archie "
    "Bob Tim Rex Bobo Nico Paco Ziggy Wally Dan Jim Noah Luke Henry Fred George Alfie Theo Kit"
)
_ONSETS = _words("b d f g h j k l m n p r s t v w z br cl dr fl gr pl sn st tr ch sh th qu")
_VOWELS = _words("a e i o u ee oo ai")
_CODAS = ["", "", "", "n", "m", "l", "r", "s", "x", "t", "ck", "mp", "nk", "ff"]
_ENDS = _words("a o i y ie us in el er a o y")


@dataclass(frozen=True)
class Character:
    """Somebody in a story: name, kind and pronouns."""

    name: str
    kind: str
    female: bool

    def values(self, role: str) -> dict[str, str]:
        """The slots this character fills: {hero}, {hero_kind}, {hero_a}, {he}, {him}, {his} (for a friend: {f_he}...)."""
        he, him, his = ("she", "her", "her") if self.female else ("he", "him", "his")
        prefix = "" if role == "hero" else "f_"
        values = {role: self.name, f"{role}_kind": self.kind, f"{role}_a": article(self.kind)}
        for name, pronoun in (("he", he), ("him", him), ("his", his)):
            values[prefix + name] = pronoun
            values[prefix + name.capitalize()] = pronoun.capitalize()
        return values


def article(noun: str) -> str:
    """The noun behind its indefinite article: "a fox", "an owl", "a unicorn"."""
    return f"{'an' if noun[0] in 'aeio' else 'a'} {noun}"


def invented_name(rng: random.Random) -> str:
    """A name from nobody's list, so that a model has to copy a name and cannot only choose one."""
    parts = [rng.choice(_ONSETS) + rng.choice(_VOWELS) + rng.choice(_CODAS)]
    if rng.random() < 0.7:
        parts.append(rng.choice(_ONSETS) + rng.choice(_ENDS))
    return "".join(parts).capitalize()


def character(
    rng: random.Random, kind: str | None = None, name: str | None = None, other: Character | None = None
) -> Character:
    """Somebody of the kind and name given, or drawn; never of the kind or the name of `other`."""
    kind = kind or rng.choice([k for k in KINDS if other is None or k != other.kind])
    female = kind in FEMALE or (kind not in MALE and rng.random() < 0.5)
    while name is None or (other is not None and name == other.name):
        known = rng.random() < 0.6
        name = rng.choice(HER_NAMES if female else HIS_NAMES) if known else invented_name(rng)
    if name in HER_NAMES or name in HIS_NAMES:
        female = name in HER_NAMES if kind not in FEMALE + MALE else female
    return Character(name, kind, female)


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
