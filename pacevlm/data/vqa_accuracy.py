"""VQA accuracy: an answer is as right as people agree with it, after the official normalisation.

Source: Antol et al., "VQA", 2015, section 4; Goyal et al., "Making the V in VQA Matter", 2017; the rules and word lists
are those of the evaluation script of VQA v2 (github.com/GT-Vision-Lab/VQA).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence

NUM_AGREEING = 3

_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGITS = {"none": "0"} | {word: str(number) for number, word in enumerate(_WORDS)}
_ARTICLES = frozenset({"a", "an", "the"})
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'

# Each is restored where exactly one of its apostrophes is missing.
_CONTRACTIONS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've
    o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
    someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
    there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
    what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
    wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
_RESTORED = {
    word[:place] + word[place + 1 :]: word
    for word in _CONTRACTIONS.split()
    for place, sign in enumerate(word)
    if sign == "'"
}
_RESTORED["somebody'd"] = "somebodyd"  # as the script has it


def vqa_accuracy(answer: str, references: Sequence[str], choices: Sequence[str] = ()) -> float:
    """Mean over the references of min(1, how many of the *others* agree with the answer / 3).

    With the ten answers of VQA that is 0.3, 0.6, 0.9 and 1 for one, two, three and more that agree. Of fewer than four
    references all others have to agree, and a single one has nobody beside it and counts itself.

    Answers and references are always normalised. The script leaves that out where all ten agree, so that it gives 0 to
    `Yes.` beside ten times `yes`; this gives 1.
    """
    given = normalise_vqa(answer)
    agrees = [given == normalise_vqa(reference) for reference in references]
    if len(agrees) == 1:
        return float(agrees[0])
    needed = min(NUM_AGREEING, len(agrees) - 1)
    total = sum(agrees)
    return sum(min(1.0, (total - own) / needed) for own in agrees) / len(agrees)


@functools.lru_cache(maxsize=1 << 16)
def normalise_vqa(text: str) -> str:
    """Lower case without articles and punctuation, number words as digits, contractions with their apostrophes.

    A sign between two letters becomes a space; beside a space, or in a text that holds a number like 1,000, it is
    dropped. Full stops stay in front of digits alone, apostrophes and colons stay.
    """
    text = text.replace("\n", " ").replace("\t", " ").strip()
    bare = text
    dropped = re.search(r"\d,\d", text) is not None
    for sign in _PUNCTUATION:
        bare = bare.replace(sign, "" if dropped or f"{sign} " in text or f" {sign}" in text else " ")
    bare = re.sub(r"\.(?!\d)", "", bare)
    words = (_DIGITS.get(word, word) for word in bare.lower().split())
    return " ".join(_RESTORED.get(word, word) for word in words if word not in _ARTICLES)
