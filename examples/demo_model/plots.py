"""The plots: what may happen in a story. Each is a list of sentences, each sentence a rule of grammar.py."""

from __future__ import annotations

import random
from dataclasses import dataclass

from grammar import Character, article, character, draw, expand, sentence_case

# Each names kind and name, and none begins with a name: a word is another token where no space stands before it.
OPENINGS = [
    "[Once upon a time|Once|One day|Long ago|A long time ago], there was {hero_some} [named|named|called] {hero}.",
    "[There was once|Once there was] {hero_some} [named|called] {hero}.",
    "In [a quiet valley|a green forest|a small village|a land far away|a little town], there lived {hero_some} "
    "[named|called] {hero}.",
    "This is the story of {hero}, {hero_some}.",
]
HOMES = [
    "{He} lived in [a small|a cosy|a warm|a tiny|a bright] [house|cottage|home] [near|beside|not far from] {place}.",
    "{hero}'s home was [close to|right beside|just behind] {place}.",
    "{He} [loved|liked] to [play|walk|sing|dance|sit in the sun] near {place}.",
    "Every [morning|evening|day], {he} [walked|ran|went] to {place}.",
    "{He} had [big dreams|a kind heart|bright eyes and a warm smile|a loud and happy laugh].",
    "The {hero_adjective} {hero_kind} lived near {place}.",
    "Everyone near {place} knew {hero} the {hero_kind}.",
]
PLACES = (
    "the river/the old oak tree/the lake/the hill/the meadow/the sea/the forest/the garden/the bridge/the pond/the "
    "mountain/the market/the old mill/the apple trees/the beach/the waterfall"
)
THINGS = (
    "red ball/blue hat/yellow kite/little boat/green scarf/silver bell/shiny button/wooden drum/golden key/toy train/"
    "warm blanket/picture book/small lantern/soft pillow/purple umbrella/wooden spoon/glass marble/brown teddy bear"
)
FOODS = "apple pie/honey cake/berry jam/warm bread/carrot soup/pear tart/nut cake/pumpkin soup/cherry cake/oat porridge"
SKILLS = "swim/sing/dance/paint/climb/skate/read/whistle/juggle/bake/ride a bike/fly a kite/play the flute/tie a knot"
MORALS = [
    "[From that day on|After that day|Ever since that day], {hero} and {friend} were [best friends|good friends|never apart].",
    "{hero} [knew|understood|learned] that [a good friend is the best treasure|it is good to help others|"
    "being kind is never a waste|trying again is how we learn|sharing makes everyone happy].",
    "[That night|That evening], {hero} [fell asleep|went to bed|slept] with a [smile|happy heart].",
    "And {hero} [never forgot that day|was happy for a long, long time|told the story to everyone {he} met].",
    "[It was the best day of all|It had been a wonderful day], and {hero} [smiled|laughed|was proud].",
]

# name of the plot -> its sentences, between opening and moral
PLOTS: dict[str, list[str]] = {
    "a lost {thing_noun}": [
        "{hero} had a {thing} that {he} [loved very much|took everywhere|kept under {his} bed at night].",
        "One [windy|rainy|sunny|cold|busy] [morning|afternoon], the {thing} was [gone|missing|nowhere to be found].",
        "{hero} looked [under the bed|behind the door|in every box|under the table] and [near {place}|in the garden|on the "
        "path], but {he} could not find it.",
        "{He} [sat down and cried|felt very sad|did not know what to do].",
        'Then {friend} the {friend_kind} [came by|walked past|came along the path] and asked, "[Why are you so sad|What is '
        'wrong|Can I help you], {hero}?"',
        '"I [lost|cannot find] my {thing}," said {hero}.',
        '"[Do not worry|Don\'t be sad]," said {friend}. "[We will look for it together|Two can look better than one|Let us '
        'look near {place}]."',
        "They [searched|looked] [all day|for a long time|high and low], and at last {friend} [saw|found] it [under a bush|on "
        "a branch|behind a big stone|in the tall grass].",
        "{hero} [hugged {friend}|jumped with joy|thanked {friend} again and again].",
    ],
    "making a friend": [
        "{hero} was [lonely|often alone], because [there was nobody to play with|{he} was too shy to speak to the others|{he} "
        "had just moved there].",
        "One [day|morning|afternoon], {he} [saw|met] {friend_a} [sitting|resting|singing] near {place}.",
        '"[Hello|Good day|Hi]! [My name is|I am] {hero}," {he} said [in a small voice|softly|with a shy smile].',
        '"And I am {friend}," said the {friend_kind}. "[Do you want to play|Would you like to play with me|Shall we '
        'play]?"',
        "They played [hide and seek|catch|with a {thing}|in the grass] until [the sun went down|the stars came out|it was "
        "time for supper].",
        "{friend} [shared|gave {hero} half of] {f_his} {food}, and it [tasted wonderful|was delicious].",
        '"[Will you come back tomorrow|Can we play again tomorrow]?" asked {friend}.',
        '"[Yes, I will|Of course|I would love to]," said {hero}, and {he} [ran home with a big smile|felt warm inside].',
    ],
    "a storm": [
        "One [evening|night|afternoon], [dark clouds covered the sky|a big storm came|the wind began to howl].",
        "The rain fell [hard|for hours|in heavy drops], and the thunder was [loud|very loud|as loud as a drum].",
        "{hero} was [safe and dry|sitting by the fire|about to go to sleep] when {he} heard [a knock at the door|a small cry "
        "outside|someone call for help].",
        "It was {friend} the {friend_kind}, [wet and cold|shaking from the cold|tired and afraid].",
        '"[My home is full of water|The wind took my roof|I lost my way in the dark]," said {friend}. "[May I stay here|Can '
        'I come in]?"',
        '"[Come in, come in|Of course you can|You are welcome here]," said {hero}.',
        "{He} gave {friend} a [warm|dry|soft] blanket and a [bowl|plate] of {food}.",
        "All night they [told stories|sang songs|played games] while the storm [raged|roared] outside.",
        "In the morning the sun [was shining|came out again], and {hero} helped {friend} [build a new home|clean up|find the way "
        "home].",
    ],
    "learning to {skill}": [
        "{hero} wanted to learn to {skill}[|, more than anything else].",
        "{He} tried [once|in the morning], but {he} [failed|could not do it|fell down with a bump].",
        "{He} tried again [after lunch|the next day], and [it went wrong again|still {he} could not do it].",
        '"[I will never learn it|It is too hard|I give up]," {he} [sighed|said sadly|cried].',
        '{friend} the {friend_kind} [heard {him}|was watching|came closer] and said, "[Nobody learns it in one day|I could not do '
        'it at first either|Small steps are steps too]."',
        "[Every day|Each morning|For a whole week], {friend} [helped {him}|showed {him} how|practised with {him}] near {place}.",
        "{hero} [fell and got up again|made many mistakes|worked hard], [but {he} did not stop|and each day it went a little "
        "better].",
        "[One fine day|At last|Then, one morning], {hero} could {skill}!",
        '"[Look at me|I can do it|I did it]!" {he} [shouted|called], and {friend} [clapped|cheered|laughed with joy].',
    ],
    "sharing": [
        "One [day|morning], {hero} [made|baked|cooked] {food}[| for supper].",
        "It smelled so good that [{his} nose danced|the whole valley noticed|even the birds came closer].",
        '"It is all mine," {hero} thought, and {he} [closed the door|hid it in a basket|carried it away to {place}].',
        "On the way {he} met {friend} the {friend_kind}, who had [nothing to eat|an empty basket|been hungry all day].",
        "{friend} did not ask for anything, but [{f_his} stomach did|{f_his} eyes were sad].",
        "{hero} looked at the {food} and [thought for a while|then at {friend}|felt sorry].",
        '"[Please, have some|Sit down and eat with me|Half of it is for you]," {he} said.',
        "They ate together [under the sky|by {place}|in the warm sun], and [it tasted better than ever|there was enough for both].",
        "The next day {friend} came back with [a basket of berries|a jar of honey|fresh bread] for {hero}.",
    ],
    "a birthday": [
        "It was {hero}'s birthday, but [nobody said a word|everyone seemed to have forgotten it|no one came to {his} door].",
        "{He} [walked|went] to {place} [alone|all alone|with a heavy heart].",
        '"[Maybe|Perhaps] [nobody remembers me|they are all too busy]," {he} thought.',
        'Then {friend} the {friend_kind} came running. "[Come quickly|Hurry, hurry|Come with me], {hero}!" {f_he} called.',
        "{hero} followed {friend} [over the hill|down the path|past {place}] as fast as {he} could.",
        "[Behind the trees|In the garden|At {friend}'s house] there were [lights|flowers|balloons], a [table|blanket] full of "
        "{food}, and all {his} friends.",
        '"[Surprise|Happy birthday], {hero}!" they [shouted|sang|called] together.',
        "{friend} gave {him} a {thing}, and {hero} [did not know what to say|laughed and cried at once|hugged everyone].",
    ],
    "a night in the dark": [
        "{hero} was afraid of the dark.",
        "[Every night|Each evening] {he} [left a candle on|hid under the blanket|asked for one more story].",
        "One night, {he} heard [a soft song|a quiet voice|a small sound] [outside the window|near {place}].",
        'It was {friend} the {friend_kind}. "[Come out and look at the sky|The night is beautiful|Do not be afraid]," {f_he} '
        "said.",
        "{hero} [took a deep breath|opened the door slowly|held {friend} tight] and [stepped outside|went out].",
        "[A thousand stars|More stars than {he} could count|A big round moon and many stars] [shone|glittered] above {place}.",
        '"[The dark is only the day, asleep|Without the dark we could not see the stars]," said {friend}.',
        "They [counted stars|watched the moon|listened to the wind] until {hero} was [no longer afraid|calm and happy].",
    ],
    "a seed": [
        "One spring day, {friend} the {friend_kind} gave {hero} a [tiny|small|round] seed.",
        '"[Plant it and be patient|Give it water and time|It needs water, sun and love]," said {friend}.',
        "{hero} [put|planted] it in the [soft|dark|warm] earth near {place}.",
        "The next day {he} looked, but [nothing had happened|there was nothing to see].",
        '"[Is it asleep|Did I do it wrong|When will it grow]?" {he} asked.',
        '"[Wait a little longer|Good things take time|It is working where you cannot see it]," said {friend}.',
        "{hero} [gave it water every morning|sang to it every evening|watched over it day after day].",
        "[After many days|Some weeks later|Then, one morning], a small green leaf [came out|looked out of the earth].",
        "In summer it was [a tall sunflower|a rose bush|a little apple tree|a big pumpkin plant], and everyone came to [see "
        "it|admire it].",
    ],
    "a rescue": [
        "One [day|afternoon], {hero} heard [someone shouting|a cry|a call for help] near {place}.",
        "{friend} the {friend_kind} was stuck [in the mud|between two rocks|in a deep hole|in a net].",
        '"[Help me, please|I cannot get out|Please do not leave me here]!" cried {friend}.',
        "{hero} [pulled|pushed and pulled] with all {his} strength, but [it was not enough|{friend} did not move].",
        "Then {he} had an idea. {He} [found a long branch|took a strong rope|used {his} {thing}].",
        '"Hold on [tight|to this]!" {he} said. "One, two, three!"',
        "With a loud [pop|plop], {friend} was free.",
        '"[You saved me|Thank you, thank you|How can I ever thank you]!" said {friend}. "[You are so brave|You are a true '
        'friend]."',
        '{hero} [smiled|blushed] and said, "[Anyone would have done it|That is what friends are for|I am glad you are safe]."',
    ],
    "a journey": [
        "{hero} had always wanted to see what was behind {place}.",
        "One [early|bright|misty] morning {he} packed [some {food}|a {thing} and some bread] and [set out|left home].",
        "{He} walked [over hills and fields|through the tall grass|along a winding path] until {his} feet were tired.",
        'At a crossing {he} met {friend} the {friend_kind}. "[Where are you going|May I come along]?" asked {friend}.',
        '"To [the other side|see the world|find out what is there]," said {hero}. "[Come with me|Let us go together]!"',
        "They crossed [a river|a dark wood|an old bridge] and [climbed|walked up] [a steep hill|many stairs of stone].",
        "From the top they saw [the wide blue sea|a valley full of flowers|a hundred little lakes|a rainbow over the land].",
        '"[It was worth every step|I have never seen anything so beautiful]," said {hero}.',
        "[In the evening|When the sun was low], they [turned back|walked home] and [sang|talked] all the way.",
    ],
    "a broken {thing_noun}": [
        "{friend} the {friend_kind} had a {thing}, and {hero} [was allowed to|asked to] play with it.",
        "But {hero} [was not careful|ran too fast|dropped it], and it broke.",
        "{He} [hid the pieces|wanted to run away|was very afraid] and [did not say anything|said nothing].",
        "[All day|All night] {he} [felt bad|could not think of anything else|had a stone in {his} stomach].",
        '[In the end|At last|The next morning], {he} went to {friend} and said, "[I broke your {thing}|It was me]. [I am so '
        'sorry|Please forgive me]."',
        "{friend} [was quiet for a while|looked at the pieces] and then [smiled|nodded].",
        '"[Thank you for telling me|It was brave to tell the truth|Things can be mended]," {f_he} said.',
        "Together they [mended it with glue|fixed it with string|put the pieces together], and it was [almost as good as "
        "new|even nicer than before].",
    ],
}

# name of the plot -> how a question may put it behind the hero
CLAUSES = {
    "a lost {thing_noun}": "who [lost|loses] {his} {thing}",
    "making a friend": "who [makes|finds] a friend",
    "a storm": "[in|and] a storm",
    "learning to {skill}": "who [learns|wants to learn] to {skill}",
    "sharing": "who [learns to share|made {food}]",
    "a birthday": "who has a birthday",
    "a night in the dark": "who is afraid of the dark",
    "a seed": "who [plants|gets] a seed",
    "a rescue": "who [saves|helps] a friend",
    "a journey": "who goes on a journey",
    "a broken {thing_noun}": "who [breaks|broke] a {thing}",
}


@dataclass(frozen=True)
class Story:
    """A story, by sentences, and what it is about."""

    hero: Character
    friend: Character
    topic: str
    clause: str
    sentences: tuple[str, ...]

    @property
    def text(self) -> str:
        return " ".join(self.sentences)


def story(rng: random.Random, plain: bool = False, strange: int = 0) -> Story:
    """A story. Where it is `plain`, its hero's adjective is not in the first sentence. `strange`: how many of hero and friend
    may have invented names and kinds."""
    hero = character(rng, strange=strange > 0)
    friend = character(rng, other=hero, strange=strange > 1)
    thing, skill, place = draw(rng, THINGS), draw(rng, SKILLS), draw(rng, PLACES)
    values = {"place": place, "thing": thing, "thing_noun": thing.split(" ", 1)[1], "skill": skill}
    values |= {"food": draw(rng, FOODS)} | hero.values("hero") | friend.values("friend")
    values["hero_some"] = article(hero.kind if plain else f"{hero.adjective} {hero.kind}")
    topic, plot = rng.choice(list(PLOTS.items()))
    rules = [
        rng.choice(OPENINGS),
        *([rng.choice(HOMES)] if rng.random() < 0.7 else []),
        *(_by_kind(rule, rng) for rule in plot),
    ]
    rules += rng.sample(MORALS, rng.choice([1, 1, 2]))
    sentences = tuple(sentence_case(expand(rule, values, rng)) for rule in rules)
    return Story(hero, friend, topic.format_map(values), expand(CLAUSES[topic], values, rng), sentences)


def _by_kind(rule: str, rng: random.Random) -> str:
    """The rule with the hero called by kind instead of by name, now and then."""
    if not rule.startswith("{hero} ") or rng.random() < 0.65:
        return rule
    return f"The {rng.choice(['', '', 'little ', '{hero_adjective} '])}{{hero_kind}}{rule.removeprefix('{hero}')}"
