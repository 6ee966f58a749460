"""How byte-level BPE vocabularies cut text before merging, by the name in `tokenizer.ggml.pre`.

No merge crosses a cut. Names and expressions are those of llama.cpp (src/llama-vocab.cpp, src/unicode.cpp). The
expressions of a name are applied one after another, each to the pieces that the last one left; what none matches is a
piece, too. They are written for Oniguruma, which the tokenizers library uses. For llama.cpp's own matcher:

- Kinds of letters (`\\p{Lu}`, ...) are all letters; `\\d` and word boundaries know ASCII alone.
- White space outside ASCII is in no range of characters.
- Some expressions only name a function, whose expression stands here.

Where an expression would look at a long run again from each of its characters, an equal one looks once.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

# llama.cpp's tables are of Unicode 15.1. What version 16 has added, blocks and characters, is in no category there.
_TOO_NEW = (
    r"\x{105c0}-\x{105ff}\x{10d40}-\x{10d8f}\x{11380}-\x{113ff}\x{116d0}-\x{116ff}\x{11bc0}-\x{11bff}\x{13460}-\x{143ff}"
    r"\x{16100}-\x{1613f}\x{16d40}-\x{16d7f}\x{1cc00}-\x{1cebf}\x{1e5d0}-\x{1e5ff}"
    r"\x{0897}\x{1b4e}-\x{1b4f}\x{1b7f}\x{1c89}-\x{1c8a}\x{2427}-\x{2429}\x{31e4}-\x{31e5}\x{a7cb}-\x{a7cd}"
    r"\x{a7da}-\x{a7dc}\x{10ec2}-\x{10ec4}\x{10efc}\x{11f5a}\x{18cff}\x{1f8b2}-\x{1f8bb}\x{1f8c0}-\x{1f8c1}\x{1fa89}"
    r"\x{1fa8f}\x{1fabe}\x{1fac6}\x{1fadc}\x{1fadf}\x{1fae9}\x{1fbcb}-\x{1fbef}"
)


@dataclass(frozen=True)
class PreTokenizer:
    """What a name in `tokenizer.ggml.pre` stands for.

    `ignore_merges`: a piece that is a token is that token, whatever the merges make of it. `add_bos`: whether BOS is
    added where the file does not say.
    """

    splits: tuple[str, ...]
    ignore_merges: bool = False
    add_bos: bool = False

    @property
    def patterns(self) -> list[str]:
        """The expressions as Oniguruma is to compile them."""
        return [re.sub(r"\\p\{[LMNPS]\}", lambda found: f"[{found[0]}&&[^{_TOO_NEW}]]", split) for split in self.splits]


# ---- parts of expressions ----

_CONTRACTION = "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_LEAD = r"[^\r\n\p{L}\p{N}]?"
_WORD = rf"{_LEAD}\p{{L}}+"
_OTHER = r" ?[^\s\p{L}\p{N}]+"
_NEWLINES = r"\s*[\r\n]+"
_SPACES = r"\s+(?!\S)|\s+"
_REST = rf"{_OTHER}[\r\n]*|{_NEWLINES}|{_SPACES}"
_DIGITS = r"\p{N}{1,3}"
_CHINESE_AND_KANA = r"[\x{4e00}-\x{9fa5}\x{3040}-\x{309f}\x{30a0}-\x{30ff}]+"
_CHINESE_AND_KOREAN = r"[\x{4e00}-\x{9fa5}\x{0800}-\x{4e00}\x{ac00}-\x{d7ff}&&[^\s]]+"
_MARKED_WORD = r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
_HAN = (
    r"\x{4e00}-\x{9fff}\x{3400}-\x{4dbf}\x{20000}-\x{2a6df}\x{2a700}-\x{2b73f}\x{2b740}-\x{2b81f}\x{2b820}-\x{2ceaf}"
    r"\x{2ceb0}-\x{2ebef}\x{f900}-\x{faff}\x{2f800}-\x{2fa1f}"
)


def _cased(letters: str, suffix: str, numbers: str) -> str:
    """Words are cut where upper case follows lower case. Letters without case count as both, as do all but ASCII's."""
    upper, lower = f"[{letters}&&[^a-z]]", f"[{letters}&&[^A-Z]]"
    words = f"{_LEAD}{upper}*{lower}+{suffix}|{_LEAD}{upper}+{lower}*{suffix}"
    return rf"{words}|{numbers}|{_OTHER}[\r\n/]*|{_NEWLINES}|{_SPACES}"


# ---- expressions ----

_GPT2 = rf"'s|'t|'re|'ve|'m|'ll|'d| ?\p{{L}}+| ?\p{{N}}+|{_OTHER}|{_SPACES}"
_LLAMA3 = f"{_CONTRACTION}|{_WORD}|{_DIGITS}|{_REST}"
_QWEN2 = rf"{_CONTRACTION}|{_WORD}|\p{{N}}|{_REST}"
_QWEN35 = rf"{_CONTRACTION}|{_LEAD}[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_NEWLINES}|{_SPACES}"
_UFAKZEKA = rf"{_WORD}|\p{{N}}|{_REST}"
_MINICPM5 = rf"{_CONTRACTION}|{_WORD}|\p{{N}}+|{_REST}"
_BAILINGMOE = rf"'(?:[sSdDmMtT]|[lL][lL]|[vV][eE]|[rR][eE])|{_WORD}|\p{{N}}|{_OTHER}[\r\n]*|\s*[\r\n]|{_SPACES}"
_SEED_CODER = rf"{_CONTRACTION}|{_WORD}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_NEWLINES}|{_SPACES}"
_EXAONE_MOE = (
    rf"{_CONTRACTION}|{_LEAD}(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|\p{{N}}|{_OTHER}[\r\n/]?|\s*[\r\n]|{_SPACES}"
)
_K2_HORIZON = rf"'\x{{17f}}|{_CONTRACTION}|{_LEAD}[\p{{L}}\p{{M}}\x{{200c}}\x{{200d}}]+|{_DIGITS}|{_REST}"
_KIMI_K2 = rf"[{_HAN}]+|{_LEAD}[\p{{L}}&&[^{_HAN}]]+{_CONTRACTION}?|{_DIGITS}|{_REST}"
_TEKKEN = _cased(r"\p{L}", "", r"\p{N}")
_GPT4O = _cased(r"\p{L}", f"{_CONTRACTION}?", _DIGITS)
_GRANITE_EMBEDDING = _cased(r"\p{L}\p{M}", f"{_CONTRACTION}?", _DIGITS)
_TINY_AYA = rf"{_LEAD}[\p{{L}}\p{{M}}]+{_CONTRACTION}?|{_DIGITS}|{_OTHER}[\r\n/]*|{_NEWLINES}|{_SPACES}"
_YOUTU = rf"{_LEAD}[\p{{L}}\p{{M}}]+{_CONTRACTION}?|\p{{N}}|{_OTHER}[\r\n/]*|{_NEWLINES}|{_SPACES}"
_YOUTU_SCRIPTS = (
    r"[\x{ac00}-\x{d7a3}\x{3131}-\x{318e}]+"
    r"|[\x{ff01}\x{2026}\x{201c}\x{201d}\x{2018}\x{2019}\x{2014}\x{ff1a}\x{ff1b}\x{ff0c}\x{3001}-\x{303f}\x{fe30}-\x{fe4f}]+"
    rf"|[\x{{3105}}-\x{{312f}}]+|{_CHINESE_AND_KANA}"
)
_DEEPSEEK3 = rf"{_MARKED_WORD}| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_NEWLINES}|{_SPACES}"
_SPARK = rf"{_MARKED_WORD}| ?[\p{{P}}\p{{S}}]+|[\r\n]|{_SPACES}"
_AFMOE_SCRIPTS = (
    r"[\x{4e00}-\x{9fff}\x{3400}-\x{4dbf}\x{8c48}-\x{faff}\x{3040}-\x{309f}\x{30a0}-\x{30ff}\x{ff65}-\x{ff9f}"
    r"\x{2f00}-\x{2fdf}\x{0e40}-\x{0e7f}\x{0e80}-\x{0eff}\x{1780}-\x{17ff}\x{1000}-\x{109f}\x{aa60}-\x{aa7f}"
    r"\x{a9e0}-\x{a9ff}\x{ac00}-\x{d7af}\x{1100}-\x{11ff}]+"
)
_BLOOM = r" ?[^(\s|.,!?\x{2026}\x{3002}\x{ff0c}\x{3001}\x{0964}\x{06d4}\x{060c})]+"
# White space in powers of two. A run is searched for newlines once, where it starts.
_JAIS2 = "|".join(
    [f"{_CONTRACTION}|{_WORD}|{_DIGITS}|{_OTHER}[\\r\\n]*|(?<![^\\S\\r\\n]){_NEWLINES}"]
    + [rf"\s{{{count}}}(?!\S)" for count in ("512", "256", "128", "64", "32", "16", "8", "4", "1,2")]
    + [r"\s"]
)
# Groups of three digits, counted from the right. What stands before a number is one piece with its first group.
_FIRST_GROUP = r"\p{N}{1,3}(?=(?>(?:\p{N}{3})*)(?!\p{N}))"
_AFMOE_DIGITS = rf"[^\p{{N}}]++(?:{_FIRST_GROUP})?|(?<!\p{{N}}){_FIRST_GROUP}|\p{{N}}{{3}}"
# A cut in front of each whole group of three of ASCII's digits, counted from the right; other digits cut nothing.
_SUPERBPE_DIGITS = r"(?:[0-9]{3}(?![0-9]))?(?:[^0-9]|(?<![0-9])[0-9]{1,2}(?=(?>(?:[0-9]{3})*)(?![0-9])))+|[0-9]{3}"
_DEEPSEEK_PUNCTUATION = r"\s?[!-/:-~\x{ff01}-\x{ff0f}\x{ff1a}-\x{ff5e}\x{2018}-\x{201f}\x{3001}-\x{3002}]+"
_DEEPSEEK_LETTERS = (
    r"\s?["
    r"A-Za-z\x{b5}\x{c0}-\x{d6}\x{d8}-\x{f6}\x{f8}-\x{1ba}\x{1bc}-\x{1bf}\x{1c4}-\x{293}\x{295}-\x{2af}"
    r"\x{370}-\x{373}\x{376}\x{377}\x{37b}-\x{37d}\x{37f}\x{386}\x{388}-\x{38a}\x{38c}\x{38e}-\x{3a1}"
    r"\x{3a3}-\x{3f5}\x{3f7}-\x{481}\x{48a}-\x{52f}\x{531}-\x{556}\x{10a0}-\x{10c5}\x{13a0}-\x{13f5}"
    r"\x{13f8}-\x{13fd}\x{1c90}-\x{1cba}\x{1cbd}-\x{1cbf}\x{1d00}-\x{1d2b}\x{1d6b}-\x{1d77}\x{1d79}-\x{1d9a}"
    r"\x{1e00}-\x{1f15}\x{1f18}-\x{1f1d}\x{1f20}-\x{1f45}\x{1f48}-\x{1f4d}\x{1f50}-\x{1f57}\x{1f59}\x{1f5b}"
    r"\x{1f5d}\x{1f5f}-\x{1f7d}\x{1f80}-\x{1fb4}\x{1fb6}-\x{1fbc}\x{1fbe}\x{1fc2}-\x{1fc4}\x{1fc6}-\x{1fcc}"
    r"\x{1fd0}-\x{1fd3}\x{1fd6}-\x{1fdb}\x{1fe0}-\x{1fec}\x{1ff2}-\x{1ff4}\x{1ff6}-\x{1ffc}\x{2102}\x{2107}"
    r"\x{210a}-\x{2113}\x{2115}\x{2119}-\x{211d}\x{2124}\x{2126}\x{2128}\x{212a}-\x{212d}\x{212f}-\x{2134}"
    r"\x{2139}\x{213c}-\x{213f}\x{2145}-\x{2149}\x{214e}\x{2183}\x{2184}\x{2c00}-\x{2c7b}\x{2c7e}-\x{2ce4}"
    r"\x{2ceb}-\x{2cee}\x{2cf2}\x{2cf3}\x{a640}-\x{a66d}\x{a680}-\x{a69b}\x{a722}-\x{a76f}\x{a771}-\x{a787}"
    r"\x{a78b}-\x{a78e}\x{ab70}-\x{abbf}\x{fb00}-\x{fb06}\x{fb13}-\x{fb17}\x{ff21}-\x{ff3a}\x{ff41}-\x{ff5a}"
    r"\x{10400}-\x{1044f}\x{104b0}-\x{104d3}\x{104d8}-\x{104fb}\x{10c80}-\x{10cb2}\x{10cc0}-\x{10cf2}"
    r"\x{118a0}-\x{118df}\x{1e900}-\x{1e943}"
    r"]+"
)
_PUNCTUATION = r"[\p{P}\$\+<=>\^~\|]+"

# ---- names ----

_NAMES: dict[str, PreTokenizer] = {
    "default": PreTokenizer((_PUNCTUATION, _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
    "llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano": PreTokenizer(
        (_LLAMA3,), ignore_merges=True, add_bos=True
    ),
    "glm4 glm5": PreTokenizer((_LLAMA3,), ignore_merges=True),
    "dbrx smaug-bpe chatglm-bpe": PreTokenizer((_LLAMA3,)),
    "gpt-2 phi-2 jina-es jina-de jina-v2-es jina-v2-de jina-v1-en jina-v2-code roberta-bpe gigachat a.x-4.0 mellum "
    "modern-bert exaone4 mpt olmo jais trillion granite-docling": PreTokenizer((_GPT2,)),
    "qwen2 deepseek-r1-qwen kormo f2llmv2 stablelm2 megrez hunyuan grok-2 solar-open": PreTokenizer((_QWEN2,)),
    "qwen35": PreTokenizer((_QWEN35,)),
    "starcoder refact command-r smollm codeshell exaone minerva-7b mellum2": PreTokenizer((r"\p{N}", _GPT2)),
    "falcon": PreTokenizer((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]")),
    "deepseek-llm": PreTokenizer(
        (r"[\r\n]", _DEEPSEEK_LETTERS, _DEEPSEEK_PUNCTUATION, r"(?<!\s)\s++\z", _CHINESE_AND_KOREAN, r"\p{N}+")
    ),
    "deepseek-coder": PreTokenizer((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CHINESE_AND_KOREAN, r"\p{N}")),
    "deepseek-v3 hunyuan-dense joyai-llm hy_v4": PreTokenizer((_DIGITS, _CHINESE_AND_KANA, _DEEPSEEK3)),
    "spark2_5": PreTokenizer((_DIGITS, _CHINESE_AND_KANA, _SPARK, r"\p{N}")),
    "youtu": PreTokenizer((_YOUTU_SCRIPTS, _YOUTU), ignore_merges=True),
    "poro-chat bloom gpt3-finnish": PreTokenizer((_BLOOM,)),
    "viking": PreTokenizer((_BLOOM, r"\p{N}")),
    "tekken": PreTokenizer((_TEKKEN,), ignore_merges=True, add_bos=True),
    "chameleon": PreTokenizer(
        (
            "<sentinel:[0-9]+>",
            "(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z",
            r"([\t\n]|    |  )",
            r"\p{N}",
            r"[\p{P}!-/:-@\[-`{-~]",
            _GPT2,
        ),
        add_bos=True,
    ),
    "gpt-4o llama4 kanana2 talkie minimax-m2": PreTokenizer((_GPT4O,)),
    "granite-embed-multi-97m": PreTokenizer((_GRANITE_EMBEDDING,), ignore_merges=True),
    "tiny_aya cohere2moe": PreTokenizer((_AFMOE_DIGITS, _TINY_AYA)),
    "superbpe": PreTokenizer((r"\p{N}+", _SUPERBPE_DIGITS)),
    "bailingmoe bailingmoe2 llada-moe": PreTokenizer((_BAILINGMOE,)),
    "seed-coder": PreTokenizer((_SEED_CODER,)),
    "exaone-moe": PreTokenizer((_EXAONE_MOE,)),
    "kimi-k2": PreTokenizer((_KIMI_K2,)),
    "k2-horizon": PreTokenizer((_K2_HORIZON,)),
    "ufakzeka": PreTokenizer((_UFAKZEKA,)),
    "minicpm5": PreTokenizer((_DIGITS, _MINICPM5), ignore_merges=True),
    "afmoe": PreTokenizer((_AFMOE_DIGITS, _AFMOE_SCRIPTS, _DEEPSEEK3)),
    "laguna": PreTokenizer((r"[^\n]+|[\n]+", _QWEN2)),
    "jais-2": PreTokenizer((_JAIS2,)),
}
PRE_TOKENIZERS: dict[str, PreTokenizer] = {name: pre for names, pre in _NAMES.items() for name in names.split()}

# Names whose vocabularies llama.cpp merges from characters instead of bytes.
NOT_BYTE_LEVEL = frozenset({"gemma4", "granite-embed-multi-311m", "mmbert", "sarvam-moe", "whitespace"})
