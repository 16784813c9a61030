"""Random English sentences from a small grammar, for synthetic speech.

A rule is a choice of words, or of phrases that name other rules as `<rule>`. Rules form no cycle, so every
expansion ends. The words cover the sounds of English and have one pronunciation each.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from typing import Literal

Text = Literal["sentences", "digits"]

PHRASES: Mapping[str, tuple[str, ...]] = {
    "sentence": ("<short>", "<medium>", "<medium>", "<medium>", "<long>", "<long>"),
    "short": (
        "<clause> <where>.",
        "<clause> <manner>.",
        "<when>, <clause>.",
        "<question>?",
        "<remark>.",
    ),
    "medium": (
        "<clause>, <conjunction> <clause>.",
        "<when>, <clause>, <conjunction> <clause>.",
        "<subordinator> <clause>, <clause> <where>.",
        "<clause> <where>, <conjunction> <clause> <manner>.",
        "<question>, and <question>?",
        "<person_phrase> <reported> that <clause>, <conjunction> <clause>.",
    ),
    "long": (
        "<when>, <clause> <where>, <conjunction> <clause>, and then <clause>.",
        "<subordinator> <clause> <manner>, <clause> <where>, <conjunction> <remark>.",
        "<person_phrase> <reported> that <clause> <where>, that <clause>, and that <remark>.",
        "<when>, <subordinator> <clause>, <clause> <manner>, and <remark>, because <clause>.",
        "<amount>, <amount>, and <thing_phrase> were all <where>, <conjunction> <clause> <manner>.",
    ),
    "clause": (
        "<person_phrase> <person_verb_past> <thing_phrase>",
        "<person_phrase> <person_verb_past> <amount>",
        "<person_phrase> <modal> <person_verb> <thing_phrase>",
        "<person_phrase> <gave> <recipient> <thing_phrase>",
        "<mover_phrase> <moved> <direction>",
        "<animal_phrase> <animal_verb_past> <manner>",
        "<thing_phrase> <seemed> <adverb> <quality>",
        "<amount> <lay> <where>",
    ),
    "remark": (
        "there was <one> <quality> <thing> <where>",
        "nobody could <person_verb> <thing_phrase> <when>",
        "it was too <quality> to <person_verb> <thing_phrase>",
        "everyone enjoyed the <quality> <food> <when>",
    ),
    "question": (
        "<asking> did <person_phrase> <person_verb> <thing_phrase>",
        "<asking> would <person_phrase> <person_verb> <amount>",
        "<modal> <person_phrase> really <person_verb> <thing_phrase>",
    ),
    "person_phrase": ("<owner> <person>", "the <temper> <person>", "<name>", "<pronoun>"),
    "recipient": ("<owner> <person>", "<owner> <temper> <person>", "<name>"),
    "animal_phrase": ("<owner> <animal>", "the <quality> <animal>", "<number> <temper> <animals>"),
    "mover_phrase": ("<person_phrase>", "<animal_phrase>", "the <vehicle>", "<one> <quality> <vehicle>"),
    "thing_phrase": ("<owner> <thing>", "<owner> <quality> <thing>", "<one> <colour> <thing>", "the <food>"),
    "amount": ("<number> <quality> <things>", "<number> <colour> <things>", "a <measure> of <food>"),
    "where": ("<near> the <place>", "<near> the <quality> <place>", "<near> <owner> <colour> <place>"),
    "direction": ("<along> the <place>", "<along> the <quality> <place>", "from the <place> to the <place>"),
    "manner": ("<adverb>", "very <adverb>", "with <one> <quality> <thing>", "without any <feeling>"),
    "when": (
        "on <day> <daytime>",
        "early in the <season>",
        "<number> <period> ago",
        "long before <day>",
        "at half past <hour>",
        "before <hour> o'clock",
        "in <month>",
    ),
    "digits": tuple(" ".join(["<digit>"] * count) + "." for count in (4, 5, 6, 7, 8)),
    "person_verb": ("<verb>",),
    "person_verb_past": ("<verb_past>", "<verb_past>", "never <verb_past>", "always <verb_past>"),
}

WORDS: Mapping[str, str] = {
    "owner": "the my our your his her this every",
    "one": "a one another",
    "pronoun": "he she we they you",
    "name": ("george charlotte thomas joyce arthur beatrice hugo chloe jonathan yvonne edith victor zoe oscar ruth"),
    "person": (
        "farmer teacher sailor doctor neighbour uncle daughter brother shepherd merchant judge captain "
        "musician painter stranger cousin widow butcher engineer guard nurse queen scholar thief boy poet "
        "juggler"
    ),
    "temper": (
        "young old cheerful patient stubborn curious gentle clever weary honest jealous proud shy "
        "thoughtful foolish brave lonely anxious joyful ruthless"
    ),
    "animal": ("horse pigeon badger tortoise kitten wolf rooster donkey squirrel giraffe owl hedgehog lizard beaver"),
    "animals": ("horses pigeons badgers foxes kittens sheep geese oxen squirrels mice owls spiders zebras goats"),
    "vehicle": "train wagon ferry sledge bicycle carriage barge tractor steamship lorry balloon",
    "thing": (
        "basket lantern treasure kettle mirror hammer violin letter cushion feather umbrella candle hatchet "
        "jewel map rope shovel telescope wheel book needle jacket necklace drawing whistle ladder thimble "
        "parcel measure vase television brush chair toy key"
    ),
    "things": (
        "coins shells bottles ribbons buttons matches oranges pebbles boxes stamps pencils bridges watches "
        "roses photographs gloves branches stories nails sausages cushions keys badges clocks songs voyages"
    ),
    "food": ("bread cheese honey soup rice chocolate butter porridge ginger fruit sugar garlic spinach oil juice milk"),
    "measure": "cup bowl jar pound barrel handful spoonful bucket touch",
    "place": (
        "harbour village garden mountain bakery library river orchard kitchen church market valley forest "
        "cottage station bridge school tower cave beach meadow theatre museum courtyard garage castle shore"
    ),
    "near": "behind near above under beyond beside inside outside across by",
    "along": "along through past towards around over into down",
    "quality": (
        "heavy broken smooth ancient narrow beautiful dusty fresh enormous thin rough bright strange quiet "
        "warm frozen hollow wooden precious useful square loud shallow thick usual vast rusty pure moist "
        "fair"
    ),
    "colour": "red yellow blue green orange purple brown white black grey golden silver violet",
    "number": "two three four five six seven eight nine ten eleven twelve thirteen twenty forty",
    "digit": "zero one two three four five six seven eight nine",
    "hour": "one two three four five six seven eight nine ten eleven twelve",
    "verb": (
        "carry measure borrow paint watch choose follow polish examine wash admire sharpen repair describe "
        "hide want reach touch push join enjoy change view avoid allow divide finish gather notice rescue"
    ),
    "verb_past": (
        "carried measured borrowed painted watched chose followed polished examined washed admired bought "
        "found broke lost caught stole brought forgot took threw heard saw kept built pulled joined shook "
        "drew sold hid"
    ),
    "gave": "gave handed showed offered sold lent taught promised",
    "moved": ("walked hurried rolled travelled wandered rushed drifted crept raced moved turned went marched vanished"),
    "animal_verb_past": ("slept growled jumped shivered yawned sneezed danced ate breathed howled sang fought climbed"),
    "seemed": "seemed looked became was remained felt appeared",
    "lay": "lay were stood vanished shone belonged hung",
    "reported": "said thought believed knew explained whispered shouted imagined feared argued",
    "modal": "could would should might couldn't wouldn't",
    "asking": "why when how where",
    "adverb": (
        "slowly quietly carefully nervously suddenly gladly roughly smoothly loudly eagerly foolishly "
        "calmly usually thoroughly awkwardly cheerfully fully"
    ),
    "feeling": "trouble pleasure fear hope joy doubt anger thanks noise patience luck thought",
    "conjunction": "and but so while because until",
    "subordinator": "although because when before after since whenever",
    "day": "monday tuesday wednesday thursday friday saturday sunday",
    "daytime": "morning afternoon evening night",
    "season": "spring summer autumn winter",
    "month": "january february march april may june july august september october november december",
    "period": "days weeks months years hours",
}

RULES: Mapping[str, tuple[str, ...]] = {
    **PHRASES,
    **{name: tuple(words.split()) for name, words in WORDS.items()},
}

_REFERENCE = re.compile(r"<(\w+)>")
_ARTICLE_BEFORE_VOWEL = re.compile(r"\ba (?=[aeiou])(?!one\b|us(?:eful|ual)\b)")


def draw_sentence(generator: random.Random, text: Text = "sentences") -> str:
    """Draw a sentence of 5 to about 45 words, or 4 to 8 digits, in lower case, with punctuation for the voice.

    A pure function of the state of `generator`.
    """

    def expand(rule: str) -> str:
        return _REFERENCE.sub(lambda reference: expand(reference[1]), generator.choice(RULES[rule]))

    return _ARTICLE_BEFORE_VOWEL.sub("an ", expand("digits" if text == "digits" else "sentence"))


def transcript(sentence: str) -> str:
    """The sentence in the transcript format of LibriSpeech: upper-case words and single spaces."""
    return re.sub(r"[,.?]", "", sentence).upper()
