"""Conversations: what a user may say to the demo model and what it answers. Rules are those of grammar.py."""

from __future__ import annotations

import random
from collections.abc import Callable

from grammar import KINDS, Character, article, character, draw, expand, invented_name
from plots import PLACES, THINGS, Story, story

Turn = tuple[str, str]  # what the user says, what the model answers
Message = dict[str, str]  # role, content

NAME = "the llorch demo"
_ADJECTIVES = "little/small/brave/kind/shy/clever/young/happy/curious/tiny/funny/sleepy"

GREETINGS = "[Hello|Hi|Hey|Good morning|Good evening|Hello there|Hi there|Hey there|Good day]"
HELLOS: list[tuple[str, str]] = [
    (
        GREETINGS + "[|!|.|, how are you?]",
        "[Hello|Hi|Hello there]! [I am glad you are here|Nice to meet you|It is good to see you]. [Would you like to hear "
        "a story|Shall I tell you a story|Ask me for a story, if you like][?|!]",
    ),
    (
        "How are you[|?| today?| doing?]",
        "I am [fine|very well|happy], thank you! [And you|How are you]? [I have a story for you, if you like|Ask me for a "
        "story whenever you like].",
    ),
    (
        "[Thank you|Thanks|Thanks a lot|Great, thanks|That was nice|I liked that|What a nice story|Cool|Good story][|!|.]",
        "[You are welcome|I am glad you liked it|With pleasure]! [Would you like another one|Shall I tell you one more]?",
    ),
    (
        "[Bye|Goodbye|Good night|See you|See you later|I have to go][|!|.]",
        "[Goodbye|Bye|See you soon]! [Come back when you want another story|It was nice to talk with you|Sleep well and "
        "dream of good friends].",
    ),
]
ABOUT: list[tuple[str, str]] = [
    (
        "[What are you|Who are you|What is this|Are you a robot|Are you human|Are you real|Tell me about yourself][?|]",
        "I am {name}, a [very small|tiny] language model. I can tell [little|short] stories, continue yours, and do simple "
        "sums.",
    ),
    (
        "[What is your name|What's your name|Do you have a name|How shall I call you][?|]",
        "[I am|You can call me] {name}. [What would you like to hear|Shall I tell you a story]?",
    ),
    (
        "[What can you do|How can you help me|Help|What do you know|What should I ask you][?|]",
        "I can tell you a story about [a fox named Pip|an owl named Luna|almost any animal], go on with a story that you "
        "begin, and [add small numbers|do small sums]. [Try me|Ask away]!",
    ),
    (
        "[Who made you|Who trained you|Where do you come from|How were you made|How were you trained][?|]",
        "I was trained by the llorch project on stories that a grammar wrote. I am here to show how llorch works.",
    ),
    (
        "[How big are you|How many parameters do you have|Are you smart|Are you clever][?|]",
        "I am [tiny|very small]: about three million parameters. [Load a real model into llorch for real questions|For hard "
        "questions, load a bigger model].",
    ),
]
AGREED = "[Yes|Yes, please|Sure|Ok|Okay|Yes, tell me one|Of course|I would love that|Please do|Go on|Another one][|!|.]"
DECLINED = [("[No|No, thank you|No thanks|Not now|Maybe later][|.|!]", "[That is fine|All right]! [I am here when you want "
             "one|Tell me when you would like one].")]  # fmt: skip
UNKNOWN = [
    "[What is the capital of|How far away is|How old is|Where is|Who lives in|Tell me about] "
    "[France|Japan|Spain|the moon|Mars|London|America|China|Egypt|the sun|Italy|India][?|]",
    "[Who|What|When|Why|How] [was|is|are|were|did] [the first king|the biggest ocean|gold|electricity|the internet|a black "
    "hole|the president|volcanoes|dinosaurs|computers|music|physics|a prime number][?|]",
    "[Write|Give me|Show me] [some code|a Python program|a recipe|an essay|an email|a list of cities|the news|a joke|a "
    "poem][|.|, please]",
    "[Translate|Explain|Summarize|Describe] [this text|quantum physics|gravity|the weather|history|evolution|my homework]"
    "[|.|, please]",
    "[How do I|How can I|Can you help me] [fix my car|learn French|cook rice|find a job|install Linux|write a book|lose "
    "weight][?|]",
]
NOT_KNOWN = (
    "[I do not know that|That is too hard for me|I am too small to know that], [I am sorry|sorry]. I only know [short|little] "
    "stories and [simple|small] sums. [Shall I tell you a story|Would you like a story instead]?"
)
ASK = (
    "[Tell me|Please tell me|Can you tell me|Could you tell me|I want to hear|I would like|Write|Write me|Give me|Tell us] "
    "[a story|a short story|a little story|a bedtime story|a nice story|a tale]"
)
CONTINUE = (
    "[Continue|Go on with|Finish|Complete|Please continue] [this story|the story|my story|this][: |:\n|. ]{start}"
)
SUM_QUESTION = "[What is|What's|How much is|Tell me|Can you add|Please tell me][?| ] {sum}[?|]"


def conversation(rng: random.Random) -> list[Message]:
    """One to four turns, sometimes behind a system prompt."""
    turns: list[Turn] = []
    for _ in range(rng.choice([1, 1, 1, 2, 2, 3, 4])):
        offered = bool(turns) and turns[-1][1].endswith("?")
        if offered and rng.random() < 0.4:
            turns.append(agreed(rng) if rng.random() < 0.85 else _pair(DECLINED)(rng))
        else:
            turns.append(rng.choices(*zip(*_KINDS_OF_TURN, strict=True))[0](rng))
    messages = [{"role": "system", "content": _system(rng)}] if rng.random() < 0.15 else []
    for question, answer in turns:
        messages += [{"role": "user", "content": _typed(question, rng)}, {"role": "assistant", "content": answer}]
    return messages


def _typed(text: str, rng: random.Random) -> str:
    """As people type: some without a capital or a full stop."""
    if rng.random() < 0.15:
        text = text[:1].lower() + text[1:]
    return text.rstrip(".!?") if rng.random() < 0.1 else text


def _system(rng: random.Random) -> str:
    return expand("You are a [helpful|friendly|kind] assistant[|.| who tells stories.]", {}, rng)


def _pair(pairs: list[tuple[str, str]]) -> Callable[[random.Random], Turn]:
    def turn(rng: random.Random) -> Turn:
        question, answer = rng.choice(pairs)
        return expand(question, {"name": NAME}, rng), expand(answer, {"name": NAME}, rng)

    return turn


def introduction(rng: random.Random) -> Turn:
    name = character(rng).name if rng.random() < 0.7 else invented_name(rng)
    question = "[Hello, |Hi, |Hey, |][I am|I'm|My name is|my name is] {user}[|.|!]"
    answer = "[Hello|Hi|Nice to meet you], {user}! [Shall I tell you a story|What would you like to hear]?"
    return expand(question, {"user": name}, rng), expand(answer, {"user": name}, rng)


def unknown(rng: random.Random) -> Turn:
    return expand(rng.choice(UNKNOWN), {}, rng), expand(NOT_KNOWN, {}, rng)


def agreed(rng: random.Random) -> Turn:
    return expand(AGREED, {}, rng), story(rng).text


def asked_story(rng: random.Random) -> Turn:
    """The story has the characters that were asked for."""
    told = story(rng)
    ask = expand(ASK, {}, rng) + _subject(told, rng) + rng.choice([".", "", "!", "?", ", please.", " please"])
    return ask, told.text


def _subject(told: Story, rng: random.Random) -> str:
    hero, friend = told.hero, told.friend
    form = rng.random()
    if form < 0.5:
        return f" about {_named(hero, rng)}"
    if form < 0.6:
        return f" about {_named(hero, rng)} and {_named(friend, rng)}"
    if form < 0.72:
        return f" about {_some(hero, rng)}"
    if form < 0.8:
        return f" about {_some(hero, rng)} and {_some(friend, rng)}"
    if form < 0.86:
        return f" about {hero.name}"
    if form < 0.93:
        return f" about {told.topic}"
    return ""


def _some(who: Character, rng: random.Random) -> str:
    return article(f"{draw(rng, _ADJECTIVES)} {who.kind}" if rng.random() < 0.25 else who.kind)


def _named(who: Character, rng: random.Random) -> str:
    return f"{_some(who, rng)} {rng.choice(['named', 'named', 'called', 'whose name is'])} {who.name}"


def continued_story(rng: random.Random) -> Turn:
    """The user has the first sentences, the model the rest."""
    told = story(rng)
    cut = rng.randint(1, 4)
    return expand(CONTINUE, {"start": " ".join(told.sentences[:cut])}, rng), " ".join(told.sentences[cut:])


def simple_sum(rng: random.Random) -> Turn:
    """Sums and differences of numbers up to 20, products up to 10 times 10."""
    sign = rng.choice("++--*")
    a, b = (rng.randint(0, 10), rng.randint(0, 10)) if sign == "*" else (rng.randint(0, 20), rng.randint(0, 20))
    if sign == "-":
        a, b = max(a, b), min(a, b)
    result = {"+": a + b, "-": a - b, "*": a * b}[sign]
    word = {"+": "plus", "-": "minus", "*": "times"}[sign]
    written = rng.choice([f"{a} {sign} {b}", f"{a}{sign}{b}", f"{a} {word} {b}"])
    question = rng.choice(
        [f"What is {written}?", f"what is {written}", f"How much is {written}?", written, f"{written}?"]
    )
    return question, f"{a} {word} {b} is {result}."


def described(rng: random.Random) -> Turn:
    """Opinions, which need no knowledge."""
    thing = rng.choice([article(rng.choice(KINDS)), f"a {draw(rng, THINGS)}", draw(rng, PLACES)])
    question = f"Do you like {thing}?"
    return question, expand("[Oh yes|Yes, very much|I do]! I know [many|some] stories with {thing}. [Shall I tell you one|"
                            "Would you like to hear one]?", {"thing": thing}, rng)  # fmt: skip


_KINDS_OF_TURN: list[tuple[Callable[[random.Random], Turn], float]] = [
    (asked_story, 5.0),
    (continued_story, 1.0),
    (simple_sum, 1.6),
    (_pair(HELLOS), 1.0),
    (_pair(ABOUT), 0.8),
    (introduction, 0.4),
    (unknown, 0.6),
    (described, 0.2),
]
