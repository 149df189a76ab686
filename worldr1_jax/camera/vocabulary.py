"""What the camera clause of a prompt is made of (commands.py): names of commands, and what English
says beside them."""

import re

PUBLISHED: tuple[str, ...] = (
    "push_in",
    "pull_out",
    "move_left",
    "move_right",
    "orbit_left",
    "orbit_right",
    "pan_left",
    "pan_right",
    "fixed",
)
EXTENSIONS: tuple[str, ...] = (
    "tilt_up",
    "tilt_down",
    "move_up",
    "move_down",
    "roll_left",
    "roll_right",
)
NAMES: tuple[str, ...] = PUBLISHED + EXTENSIONS
SPEEDS: tuple[str, ...] = ("", "slowly", "quickly")
TURNS: tuple[str, ...] = tuple(
    name for name in NAMES if name.startswith(("pan", "tilt", "roll", "orbit"))
)

_MARKS = r"""[\s"'“”‘’«»„(\[{*_#>•·‣–—-]"""  # of quotations, lists and headings
HEAD = re.compile(
    rf"(?:{_MARKS}|\(?\d{{1,3}}[.):]\s)*(?:the\s+)?cameras?(?![a-z0-9])[\s:=_\"“'–—-]*"
    r"(?:first\b[\s,]*)?",
    re.IGNORECASE,
)
# A point inside "7.5 degrees" or before ".5 degrees" does not end a sentence.
SENTENCE = re.compile(
    r"""(?P<body>(?:[^.!?;…。\n"”»)\]}]|\.(?=\d))*)"""
    r"""(?P<end>[.!?;…。\n"”»)\]}]*[*_']*\s*)"""
)
GOES_ON = re.compile(  # a sentence behind the first that speaks of the camera still
    r"(?:and\s+)?(?:then|next|after (?:that|this)|afterwards?|subsequently|second(?:ly)?|"
    r"finally|lastly|it|(?:the\s+)?(?:camera|view|shot))\b[\s,:]*",
    re.IGNORECASE,
)
OPENS = re.compile(rf"(?:{_MARKS}|,)*")
# Openings of a sentence: manners of a camera, as "family" and "Emily" are none; and what is as
# likely seen as asked for, "Moving up the stairs is an old man".
HOW = re.compile("(?:slow|quick|rapid|swift|brisk|gent|smooth|slight|steadi|gradual|subt)ly")
HOW_AT_LAST = re.compile(r"(?:[a-z]+[\s,]+){0,3}(?:slow|quick|fast)(?:ly)?\s*$")  # "very slowly"
# The same, of a movement that is named as a thing, "Slow pan left", and of one that goes on.
HOW_ELSE = re.compile(
    rf"{HOW.pattern}|slow|quick|fast|smooth|gentle|steady|and|also|keeps?|continues?|to"
)
# Ends of what leads a sentence: a scene may open with the first, "View up the street.", and what
# the camera sees may be the other.
SCENES_OPEN = re.compile(r"(?:view|shot|second)\W*$", re.IGNORECASE)
ENDS_IN_IT = re.compile(r"\bit\W*$", re.IGNORECASE)
NO_HOW = re.compile(r"(?:\w*f|fami|emi|li|mil|mol|sal|al|bul|bel|jel|ital|assemb)ly")
SEEN_MOVING = re.compile(r"fixed|(?:mov|roll|push|pull)\w*(?:ing|ed)\b")
_ENDING = "(?:s|es|d|ed|ing|ning|ting)?"  # pushes in, panning left
_GAP = r"[\s_-]+"


# What follows a direction, and no place: "to the right of it", "to the left wall".
_NO_PLACE = (
    rf"(?!{_GAP}(?!(?:and|then|with|at|in|over|across|along|through|past|on|around|towards?|to|by|"
    r"for|from|as|while|before|showing|revealing|under|between|behind|below|above|near|beside)\b"
    r"|\w+ly)[a-z])"
)


def _phrase(name: str) -> str:
    """Regular expression of one command: inflected verb, any separator, whole words only."""
    verb, *direction = name.split("_")
    if verb == "move":
        verb = "mov(?:e)?"
    ending = "" if verb == "fixed" else _ENDING
    for here, there in (("left", "right"), ("right", "left")):
        if direction == [here]:  # "pans to the left", "pans leftwards", "pans from right to left"
            across = (
                rf"(?:from{_GAP})?(?:the{_GAP})?{{}}{_GAP}to{_GAP}(?:the{_GAP})?{{}}{_NO_PLACE}"
            )
            one = rf"(?:to\s+(?:the|its)\s+)?{here}(?:wards?)?"
            other = across.format(here, there)
            direction = [rf"(?!{other})(?:{across.format(there, here)}|{one})"]
    if direction:  # "pans slowly left"
        direction[0] = rf"(?:{HOW.pattern}{_GAP})?{direction[0]}"
    return _GAP.join([verb + ending, *direction])


COMMANDS = re.compile(
    r"(?<![a-z])(?:" + "|".join(f"(?P<{name}>{_phrase(name)})" for name in NAMES) + r")(?![a-z])"
)
SEPARATOR = re.compile(r"[,;&+/|]|->|→|\bthen\b|\band\b|\btransition(?:s|ing)\b")
# A sign or a range before the number, and it is none: "-30 degrees", "20-30 degrees".
DEGREES = re.compile(
    r"(?:\bby\s+)?(?<![\w.−–-])\+?(\d+(?:\.\d+)?)[\s-]*(?:°|º|deg(?:rees?)?\b)"
    r"(?!\s*(?:[cf]\b|celsius|fahrenheit))"
)
SPEED = re.compile(
    r"\b(?:(?P<slowly>slow(?:ly)?)|(?P<quickly>(?:quick|rapid|swift|brisk)(?:ly)?|fast))\b"
)
# Of what the camera sees: "to the fast river", "on a slowly spinning top".
SEEN_SPEED = re.compile(
    r"\b(?:an?|the)\s+(?:slow|quick|fast|rapid|swift|brisk)\b|\b[a-z]+ly\s+[a-z]+(?:ing|ed)\b"
)
NARROW: dict[int, int | str] = {
    **{code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)},  # full-width letters and signs
    **dict.fromkeys(map(ord, "‐‑‒−⁻﹣"), "-"),  # each of which may be a minus
    0x130: "I",  # whose small letter is two characters
}


def _listed(words: str) -> frozenset[str]:
    return frozenset(re.findall(r"\w+", words))


# Words that may stand between commands without asking for any movement.
FILLERS = _listed(
    "then and while transitioning transitions into a an the to slowly gently smoothly quickly "
    "slightly steadily shot camera is remains stays view movement"
)
# And before the first of a part, which they leave as it is. So does what ends in "ly" and is none
# of `CHANGES`; other words are refused.
LEADS = _listed(
    "motion path work direction directions instruction instructions command commands should will "
    "must do be being it its now next also finally lastly starts start begins begin "
    "s continues continue keeps keep makes make performs perform does goes with smooth cinematic "
    "gentle steady subtle gradual continuous constant simple long short single very quite motions "
    "movements angle style trajectory control technique action setting position executes takes by"
)
# What a camera can be asked for that is no command here. The verbs always ask for movement; the
# others are things as well, and ask for it before a direction or the end ("crane up"), or
# inflected ("craning").
VERBS = re.compile(
    r"(?:zoom|doll(?:y|ie)|fl(?:y|ie)|follow|swoop|div|rotat|descend|ascend|whip|strafe|retreat|"
    r"approach|advance|glid|zigzag|spin|rush|lift|lower|push|pull|mov|pan|tilt|orbit|hover|climb|"
    r"tumbl|plung|soar)(?:e|ing|ning|ming|ping|s|es|ed)?"
)
CAMERAS_OWN = re.compile(r"(?:zoom|pan|tilt|doll(?:y|ie)|orbit)(?:s|ing|ning|ed|ned)?")
THINGS = _listed(
    "crane truck track boom jib pedestal arc spiral circle drop shake handheld sweep turn roll "
    "swing rise float drift slide dip bank loop flip walk back jump fall travel creep ease "
    "encircle revolve"
)
INFLECTED = re.compile(
    rf"(?:{'|'.join(sorted(word.rstrip('e') for word in THINGS))})\w?(?:ing|es|s)"
)
DIRECTIONS = _listed(
    "up down left right in out forward forwards backward backwards back over around upward upwards "
    "downward downwards sideways closer away zoom"
)
PREPOSITIONS = _listed(
    "toward towards past over under through along across from at on with of behind above below "
    "near beside between for by in around"
)
# Where what the camera sees begins: "push in toward the left door" asks for no other direction.
PLACE = re.compile(
    r"\b(?:toward|towards|past|over|under|through|along|across|at|on|of|behind|above|below|near|"
    r"beside|between|around|to\s+(?:reveal|show|(?:an?|the)(?!\s+(?:left|right))))\b"
)
# "It moves left" behind these is as likely what the camera sees; what pans, tilts or orbits is a
# camera.
SHOWS = re.compile(
    rf"\bfixed\b|{PLACE.pattern}|\b(?:with|by|for|from)\s+(?:an?|the)\b"
    r"(?!\s+(?:\w+\s+)?(?:push|pull|mov|pan|tilt|orbit|roll)|\s+(?:moment|while|bit|few)\b)"
)
IT_MOVES = re.compile(
    r"\s*it\b(?:\s+(?:then|also|now|next|\w+ly|will|is|starts?|begins?|to))*"
    r"\s+(?:mov|roll|push|pull)"
)
# An angle behind a place is the movement's where it comes at the end or has a word for it, and the
# place's in "around a 90 degree corner", "tilted 23 degrees", "at 60 degrees".
TO_TURN_BY = re.compile(
    r"(?:,|\b(?:by|for|over|through|around|another)|^\s*of|\b(?:arc|angle)\s+of)\s*$"
)
OF_A_PLACE = re.compile(r"(?:\b(?:an?|the|at|of|is)|\w{3,}ed)\s*$")
# "Moves down the street" goes ahead, and "moves up to the window" does.
AHEAD = re.compile(
    r"\s*(?:an?(?!\s+(?:bit|little|few|touch)\b)|the|to(?!\s+(?:reveal|show)\b)|towards?|closer?)\b"
)
TO_SHOW = re.compile(r"^\s*to\s+(?:reveal|show)\b.*", re.DOTALL)
# What a command is followed by is the scene, behind these: "Camera push in: a red fox."
ASIDE = re.compile(r":\s+|(?<!\s)\s+[-–—]+\s+|—")
# Words that turn a command beside them into something else.
CHANGES = re.compile(
    r"not|no|nor|never|without|cannot|\w+n['’]?t|avoid\w*|stop\w*|instead|rather|except|unless|"
    r"until|after|before|or|n?either|but|opposite|revers\w*|backwards?|twice|thrice|again|"
    r"repeatedly|whil(?:e|st)|as|simultaneously|left|right|up|down|(?:counter|anti)?-?clockwise|"
    r"half\w*|quarter|full|[-−–+]?\d[\w.%°º]*|x\d+|[¼-¾⅐-⅞]|-[a-z].*|minus|negative|less|more|than|"
    r"least|most|per|times|seconds?|first|second|when|whenever|if|once|same|forbidden|prohibited|"
    r"false|none|hardly|barely|scarcely|rarely|nearly|part(?:ial)?ly|previously|occasionally|"
    r"concurrently|faster|slower|speed\w*|slow(?:s|ing)|(?:ac|de)celerat\w*"
)
_COUNT = r"(?:\d+|two|three|four|five|six|several|many|a\s+few)"
_END = r"(?=\s*$|\s*,)"
MANNER = re.compile(  # said of the movement, though it looks like a place
    r"\b(?:at|with|in)\s+(?:\w+\s+){0,2}"
    rf"(?:speed|pace|rate|tempo|same\s+time|once|loop|reverse(?:\s+motion)?){_END}"
    rf"|(?:\bper\s+|/\s*|{DEGREES.pattern}\s*(?:an?|each|every)\s+)"
    r"(?:second|minute|frame|s|sec)\b"
    rf"|\b{_COUNT}\s+(?:\w+\s+)?(?:times|turns|laps|revolutions|rotations){_END}"
    rf"|\b(?:over|in|for|within)\s+{_COUNT}\s+(?:seconds|minutes){_END}"
    rf"|\b(?<!ing )(?:twice|thrice|again|repeatedly|backwards?)(?:\s+in\s+a\s+row)?{_END}"
)

STRAY = re.compile(
    r"\bcameras?(?:[^\w,;.!?]|_)+"
    r"(?:(?:\w+ly|then|and|also|now|is|to|will|starts?|begins?|slow|fast)[^\w,;.!?]+){0,3}"
    rf"(?:{'|'.join(_phrase(name) for name in NAMES if name != 'fixed')}|zoom(?:s|ing))(?![a-z])",
    re.IGNORECASE,
)
