"""Conversations: what a user may say to the demo model and what it answers. Rules are those of grammar.py."""

from __future__ import annotations

import random
from collections.abc import Callable

from grammar import (
    HER_NAMES,
    HIS_NAMES,
    KINDS,
    Character,
    article,
    character,
    draw,
    expand,
    invented_word,
    sentence_case,
)
from plots import PLACES, THINGS, Story, story

Turn = tuple[str, str]  # what the user says, what the model answers
Message = dict[str, str]  # role, content

NAME = "the llorch demo"

GREETINGS = "[Hello|Hi|Hey|Good morning|Good evening|Hello there|Hi there|Hey there|Good day]"
HELLOS: list[tuple[str, str]] = [
    (
        GREETINGS + "[|!|.|, how are you?]",
        "[Hello|Hi|Hello there]! [I am glad you are here|Nice to meet you|It is good to see you]. [Would you like to hear "
        "a story?|Shall I tell you a story?|Ask me for a story, if you like!]",
    ),
    (
        "How are you[|?| today?| doing?]",
        "I am [fine|very well|happy], thank you! [And you|How are you]? [I have a story for you, if you like|Ask me for a "
        "story whenever you like].",
    ),
    (
        "[I am|I'm|Fine, I am] [fine|good|well|very well|happy|ok|okay][|, thanks|, thank you|, too][.||!]",
        "I am glad to hear that! [Would you like to hear a story|Shall I tell you a story]?",
    ),
    (
        "[I am|I'm|I feel] [sad|tired|bored|lonely|not so good|bad][| today][.||!]",
        "I am sorry to hear that. [Maybe a story will help|A small story may cheer you up]. [Shall I tell you one|Would you "
        "like one]?",
    ),
    (
        "[Ok|Okay|Wow|Nice|Cool|Really|Oh|Haha|What|Why|Hm|I see|Good|Great|Fine][|!|.|?]",
        "[Ask me for a story about any animal you like|You can ask me for a story, or for a small sum], and I will do my best.",
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
        "[What are you|Who are you|What is this|Are you a robot|Are you human|Are you real|Tell me about yourself|Are you an "
        "AI|Are you ChatGPT|What model are you|Introduce yourself|So what are you][?|]",
        "I am {name}, a [very small|tiny] language model. I can tell [little|short] stories, continue yours, and do simple "
        "sums.",
    ),
    (
        "[What is your name|What's your name|Do you have a name|How shall I call you|Your name][?|]",
        "[I am|You can call me] {name}. [What would you like to hear|Shall I tell you a story]?",
    ),
    (
        "[What can you do|How can you help me|Help|What do you know|What should I ask you|What can I ask|What else can you "
        "do][?|]",
        "I can tell you a story about [a fox named Pip|an owl named Luna|almost any animal], go on with a story that you "
        "begin, and [add small numbers|do small sums]. [Try me|Ask away]!",
    ),
    (
        "[Who made you|Who trained you|Where do you come from|How were you made|How were you trained|Who wrote you][?|]",
        "I was trained by the llorch project on stories that a grammar wrote. I am here to show how llorch works.",
    ),
    (
        "[How big are you|How many parameters do you have|Are you smart|Are you clever|How small are you][?|]",
        "I am [tiny|very small]: about three million parameters. [Load a real model into llorch for real questions|For hard "
        "questions, load a bigger model].",
    ),
    (
        "[What is llorch|What's llorch|Tell me about llorch|What does llorch do|Explain llorch][?|.|]",
        "llorch is a server for language models. It loads GGUF files, and the part that computes is a plugin. I am only here "
        "to show that it works.",
    ),
    (
        "[How do I|How can I|Can I] [use|load|run|serve] [a real model|another model|a bigger model|my own model|a better "
        "model][?|]",
        "Start llorch with --model and the path of a GGUF file, and it will answer in my place.",
    ),
    (
        "[Do you speak|Can you speak] [German|French|Spanish|Chinese|English|Italian|Japanese|other languages][?|]",
        "I only know a little English. [Shall I tell you a story|Would you like to hear a story]?",
    ),
]
AGREED = "[Yes|Yes, please|Sure|Ok|Okay|Yes, tell me one|Of course|I would love that|Please do|Go on|Another one][|!|.]"
DECLINED = [("[No|No, thank you|No thanks|Not now|Maybe later][|.|!]", "[That is fine|All right]! [I am here when you want "
             "one|Tell me when you would like one].")]  # fmt: skip
# What it cannot answer takes any words, so that words it has never seen are a sign of such a question.
_TOPICS = (
    "France/Japan/Spain/the moon/Mars/London/America/China/Egypt/the sun/Italy/India/gold/electricity/the internet/black "
    "holes/the president/volcanoes/dinosaurs/computers/music/physics/prime numbers/history/evolution/gravity/the weather/my "
    "homework/my car/the news/Python/Linux/rice/money/love/football/the law/medicine/chemistry/the economy/war/art/space/"
    "Shakespeare/Einstein/Napoleon/Germany/Paris/New York/the universe/climate change/a good book/the best film/energy/atoms/"
    "religion/philosophy/this text/a database/an algorithm/machine learning/neural networks/a GPU/CUDA/my boss/my life"
)
UNKNOWN = [
    "[What is|What's|What are|Who is|Who was|Where is|When was|How old is|How far is|How big is] [|the capital of |the history "
    "of |the meaning of |the price of |the president of ]{topic}[?|]",
    "[Why is|Why are|How does|How do I learn|Can you explain|Explain|Describe|Tell me about|What do you think about|What do you "
    "know about|Talk about|Teach me] {topic}[?|.|]",
    "[Write|Give me|Show me|Make] [some code|a Python program|a recipe|an essay|an email|a list|a letter|a song|a function|a "
    "joke|a poem|ten ideas|a plan|a table] [about|for|with|on] {topic}[.||, please]",
    "[Translate|Summarize|Fix|Solve|Find|Buy|Compare|Calculate|Read|Open] {topic}[.||, please|?]",
    "[How do I|How can I|Can you help me|I want to|I need to] [fix|learn|cook|find|install|write|lose|build|buy|sell|win|"
    "understand] {topic}[?|.|]",
    "[Which|What] [year|day|time|city|country|colour|animal|number|language|planet] [is it|is {topic}|has {topic}|is the "
    "biggest|is the best|do you like][?|]",
    "[How many|How much] [people|planets|days|stars|bones|money|water|{topic}] [are there|is there|do I need|are in {topic}][?|]",
    "{topic}[?|.|!|]",
]
NOT_KNOWN = (
    "[I do not know that, I am sorry|I am sorry, that is too hard for me|That is more than I know, sorry]. I am a small "
    "demonstration model: I only know [short|little] stories and [simple|small] sums. [Shall I tell you a story|Would you like "
    "a story instead]?"
)
ASK = (
    "[Tell me|Tell me|Please tell me|Can you tell me|Could you tell me|I want to hear|I would like|I want|Write|Write me|Give "
    "me|Tell us|Tell|Make up|Let me hear|How about] "
    "[a story|a story|a story|a short story|a little story|a bedtime story|a nice story|a tale|another story]"
)
CONTINUE = (
    "[Continue|Go on with|Finish|Complete|Please continue] [this story|the story|my story|this][: |:\n|. ]{start}"
)


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
        if rng.random() < 0.04:
            question = expand(f"{GREETINGS}[!|,|.] ", {}, rng) + question
        messages += messages_of((_typed(question, rng), answer))
    return messages


def messages_of(turn: Turn) -> list[Message]:
    return [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]


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
    name = character(rng, strange=True).name
    question = "[Hello, |Hi, |Hey, |][I am|I'm|My name is|my name is] {user}[|.|!]"
    answer = "[Hello|Hi|Nice to meet you], {user}! [Shall I tell you a story|What would you like to hear]?"
    return expand(question, {"user": name}, rng), expand(answer, {"user": name}, rng)


def unknown(rng: random.Random) -> Turn:
    topic = draw(rng, _TOPICS)
    if rng.random() < 0.4:
        topic = " ".join(invented_word(rng) for _ in range(rng.choice([1, 1, 2])))
    return expand(rng.choice(UNKNOWN), {"topic": topic}, rng), expand(NOT_KNOWN, {}, rng)


def agreed(rng: random.Random) -> Turn:
    return expand(AGREED, {}, rng), story(rng).text


def asked_story(rng: random.Random) -> Turn:
    """The story has the characters that were asked for."""
    plain, form = rng.random() < 0.6, rng.random()
    told = story(rng, plain, strange=1 if form < 0.6 else 2 if form < 0.7 else 0)
    subject = _subject(told, plain, form, rng)
    if rng.random() < 0.1:
        return sentence_case(subject.removeprefix(" about ") or "story"), told.text
    return expand(ASK, {}, rng) + subject + rng.choice([".", "", "", "!", "?", ", please.", " please"]), told.text


def _subject(told: Story, plain: bool, form: float, rng: random.Random) -> str:
    """What the story is about; `form` from 0 to 1 says how that is said."""
    hero, friend = _some(told.hero, plain), _some(told.friend, True)
    if form < 0.54:
        clause = f" {told.clause}" if form < 0.07 else ""
        return f" about {_named(hero, told.hero, rng)}{clause}"
    if form < 0.6:
        return f" about {told.hero.name}"
    if form < 0.7:
        return f" about {_named(hero, told.hero, rng)} and {_named(friend, told.friend, rng)}"
    if form < 0.82:
        return f" about {hero}{f' {told.clause}' if form < 0.72 else ''}"
    if form < 0.88:
        return f" about {hero} and {friend}"
    if form < 0.92:
        return f" about {told.topic}"
    if form < 0.94:
        return f" about {hero} and {told.topic}"
    return ""


def _some(who: Character, plain: bool) -> str:
    return article(who.kind if plain else f"{who.adjective} {who.kind}")


def _named(some: str, who: Character, rng: random.Random) -> str:
    if rng.random() < 0.1:
        return f"{who.name} the {who.kind}"
    return f"{some} {rng.choice(['named', 'named', 'named', 'called', 'whose name is', 'with the name'])} {who.name}"


def continued_story(rng: random.Random) -> Turn:
    """The user has the first sentences, the model the rest."""
    told = story(rng, rng.random() < 0.5, strange=1)
    cut = rng.randint(1, 4)
    start, rest = " ".join(told.sentences[:cut]), " ".join(told.sentences[cut:])
    if rest.startswith(told.hero.name + " "):  # a name without a space before it is another token
        rest = ("She" if told.hero.female else "He") + rest.removeprefix(told.hero.name)
    return start if rng.random() < 0.3 else expand(CONTINUE, {"start": start}, rng), rest


def repeated(rng: random.Random) -> Turn:
    """Words to say again, most of them invented: nothing teaches as quickly to copy what takes several tokens."""
    invented = [invented_word(rng) for _ in range(rng.choice([1, 1, 2, 3]))]
    words = [word.capitalize() if rng.random() < 0.6 else word for word in invented]
    if rng.random() < 0.2:
        words[-1] = rng.choice(HER_NAMES + HIS_NAMES + KINDS)
    question = "[Say|Please say|Can you say|Repeat|Repeat after me:] {words}[|.|!]"
    values = {"words": " ".join(words)}
    return expand(question, values, rng), expand("[Here you are|All right]: {words}.", values, rng)


HIGHEST = 20  # result of a sum that it has to know


def simple_sum(rng: random.Random) -> Turn:
    """A sum, a difference or a product; it says so where a number is too large."""
    sign = rng.choice("++--*")
    a, b = _numbers(sign, rng)
    large = rng.random() < 0.08
    if large:
        a = rng.choice([rng.randint(21, 99), rng.randint(100, 9999)])
        b = rng.choice([b, rng.randint(21, 99), rng.randint(100, 9999)])
    result = {"+": a + b, "-": a - b, "*": a * b}[sign]
    word = {"+": "plus", "-": "minus", "*": "times"}[sign]
    written = f"{a}{rng.choice([f' {sign} ', f' {sign} ', sign, f' {word} ', f' {word} '])}{b}"
    if sign == "*" and rng.random() < 0.3:
        written = f"{a} x {b}"
    question = expand("[What is|What is|What's|How much is|Calculate|Do you know what is|||] {sum}[?|?|=| = ?|]",
                      {"sum": written}, rng).strip()  # fmt: skip
    if sign == "+" and rng.random() < 0.1:
        question = expand(f"[Add|Add up|What is the sum of|Can you add] {a} and {b}[?|.|]", {}, rng)
    if large:
        return question, "Those numbers are too big for me. I can add and subtract numbers up to 20."
    return question, f"{a} {word} {b} is {result}."


def _numbers(sign: str, rng: random.Random) -> tuple[int, int]:
    """Every pair with a + b (a, where they are subtracted) to HIGHEST is as likely as the others; some sums are above it.
    Factors go to 10."""
    if sign == "*":
        return rng.randint(0, 10), rng.randint(0, 10)
    if sign == "+" and rng.random() < 0.2:
        return rng.randint(1, HIGHEST), rng.randint(1, HIGHEST)
    (whole,) = rng.choices(range(HIGHEST + 1), weights=range(1, HIGHEST + 2))
    part = rng.randint(0, whole)
    return (whole, part) if sign == "-" else (part, whole - part)


def described(rng: random.Random) -> Turn:
    """Opinions, which need no knowledge."""
    thing = rng.choice([article(rng.choice(KINDS)), f"a {draw(rng, THINGS)}", draw(rng, PLACES)])
    question = f"Do you like {thing}?"
    return question, expand("[Oh yes|Yes, very much|I do]! I know [many|some] stories with {thing}. [Shall I tell you one|"
                            "Would you like to hear one]?", {"thing": thing}, rng)  # fmt: skip


_KINDS_OF_TURN: list[tuple[Callable[[random.Random], Turn], float]] = [
    (asked_story, 5.0),
    (continued_story, 1.0),
    (simple_sum, 1.8),
    (_pair(HELLOS), 1.0),
    (_pair(ABOUT), 0.9),
    (introduction, 0.4),
    (repeated, 0.6),
    (unknown, 1.2),
    (described, 0.2),
]
