"""Prompts for scenes: endless wordings for training, and the held-out ones that only measuring uses.

Every function takes the random source it draws from, so that a wording is a function of the seed.
"""
COLOURS = "red orange yellow green blue purple pink brown black white grey".split()
COUNTS = {"two": "two 2 a\u00a0pair\u00a0of".split(" "), "three": ["three", "3"], "four": ["four", "4"]}

# Never seen in training, neither the sentences nor the words of them in HELD_OUT_WORDS.
HELD_OUT = ["{n} on a white background", "photograph of the {n}", "please paint a {n} for my daughter", "could you sketch {n}?"]
HELD_OUT_WORDS = {"photograph", "paint", "daughter", "sketch"}

ASK = ["", "", "", "please ", "could you ", "can you ", "would you ", "I want you to ", "I'd like you to ", "let's ", "now ", "just "]
VERB = ["draw ", "make ", "show ", "give ", "create ", "render ", "design ", "generate ", "print ", "produce ", "depict ", "do ", "imagine ", "get "]
WHOM = ["", "", "", "me ", "us ", "them ", "my son ", "my friend "]
WHAT = ["picture", "image", "drawing", "icon", "emoji", "illustration", "sticker", "symbol", "photo", "sign", "cartoon", "logo", "painting",
        "view", "sort", "kind", "portrait", "version", "copy", "rendering"]
ADJECTIVE = ["small ", "big ", "cute ", "simple ", "nice ", "little ", "lovely ", "pretty ", "tiny ", "large ", "beautiful ", "funny ", "plain ",
             "colourful ", "good ", "great ", "new ", "fine ", "detailed "]
TAIL = [" emoji", " icon", " symbol", " picture", " please", ", please", ", simple", ", flat colours", ", on white", " on a plain background",
        ", white background", " in bright colours", ", clean lines", " sticker", ", cartoon style", ".", "!", "?", " for my son", " for me",
        " for my mother", " for her", " for the children", " for a friend", " now", " today", ", centred", ", isolated", ", 4k", ", high quality",
        ", digital art", ", vector art", " again", " thanks", ", thank you", " if you can", " with nothing else", " for my book"]
FUNCTION_WORDS = ("and with for my your our his her very some this that from into over under near old best right here there today good "
                  "really just only also maybe thanks hello can could would you me it is are was be will do did please of in at by as").split()
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def junk(r, filler):
    """A word that means no emoji: a function word, a common word, or a made-up one."""
    u = r.random()
    if u < 0.3:
        return r.choice(FUNCTION_WORDS)
    if u < 0.85:
        return r.choice(filler)
    part = lambda: r.choice("bcdfghjklmnprstvwz") + r.choice("aeiou") + r.choice(["", "", "n", "r", "s", "t", "l", "ph", "ck"])
    return "".join(part() for _ in range(r.randint(1, 3)))


def typo(r, text):
    """One slip of the fingers in a word of four letters or more."""
    words = text.split(" ")
    long = [i for i, w in enumerate(words) if len(w) >= 4]
    if not long:
        return text
    i = r.choice(long)
    w, k = words[i], r.randint(1, len(words[i]) - 2)
    words[i] = r.choice([w[:k] + w[k + 1:], w[:k] + w[k] + w[k:], w[:k] + w[k + 1] + w[k] + w[k + 2:], w[:k] + r.choice(LETTERS) + w[k + 1:]])
    return " ".join(words)


def article(word):
    return "an " if word[:1].lower() in "aeiou" else "a "


def plural(name):
    if name.endswith(("s", "x", "ch", "sh")):
        return name + ("" if name.endswith("s") and not name.endswith("ss") else "es")
    if name.endswith("y") and name[-2:-1] not in tuple("aeiou"):
        return name[:-1] + "ies"
    return name + "s"


def keyword_prompt(m):
    return ", ".join(m["keys"])


def called(r, m, exact=0.75):
    """What an emoji may be called in a longer phrase: mostly its name."""
    if r.random() < exact:
        return m["name"]
    others = m["synonyms"] * 3 + m["kinds"][:12]
    if m["keys"]:
        others += [m["name"] + " " + r.choice(m["keys"]), r.choice(m["keys"]) + " " + m["name"]]
    return r.choice(others) if others else m["name"]


def thing(r, m, colour, exact=0.75):
    """An object with its colour: "blue fox"."""
    n = called(r, m, exact)
    if colour is None:
        return n
    form = r.choice(["{c} {n}"] * 3 + ["{c} coloured {n}", "{n} in {c}", "{c} colored {n}", "{n}, {c}", "{n} that is {c}"])
    return form.format(c=colour, n=n)


def with_article(r, text):
    return r.choice(["", article(text), article(text), "the ", "one "]) + text


def single(r, m):
    """One emoji as it is: its name, its keywords, or both."""
    u, keys = r.random(), m["keys"]
    if u < 0.50 or not keys:
        return with_article(r, called(r, m, 0.85))
    if u < 0.60:
        return m["name"] + ", " + ", ".join(r.sample(keys, r.randint(1, min(3, len(keys)))))
    if m.get("keys_of_another"):        # the keywords alone mean the first emoji that has them
        return m["name"]
    if u < 0.72:
        return keyword_prompt(m)
    if u < 0.88:
        return r.choice([", ", ", ", " "]).join(r.sample(keys, r.randint(max(1, len(keys) - 2), len(keys))))
    return with_article(r, r.choice([called(r, m, 0)] + m["synonyms"] + m["kinds"]))


def pair(r, a, b, layout):
    if layout == "left":
        form = r.choice(["{a} left of {b}", "{a} to the left of {b}", "{a} on the left of {b}", "{a} next to {b}", "{a} beside {b}", "{a} and {b}",
                         "{a} and {b}", "{a} with {b}", "{b} right of {a}", "{b} to the right of {a}", "{a} on the left, {b} on the right",
                         "{a}, {b}", "{a} and then {b}"])
    else:
        form = r.choice(["{a} above {b}", "{a} over {b}", "{a} on top of {b}", "{b} below {a}", "{b} under {a}", "{a} at the top, {b} at the bottom",
                         "{b} beneath {a}", "{a} on {b}"])
    return form.format(a=a, b=b)


def body(r, emoji, scene):
    """What is to be seen, without lead-in and ground."""
    first = emoji.words[scene.first]
    if scene.layout == "one":
        return single(r, first) if scene.first_colour is None else with_article(r, thing(r, first, scene.first_colour))
    if scene.second is None:
        c, name = scene.first_colour, plural(called(r, first, 0.9)) if r.random() < 0.85 else first["name"]
        return r.choice(COUNTS[scene.layout]).replace("\u00a0", " ") + " " + (f"{c} {name}" if c else name)
    a = with_article(r, thing(r, first, scene.first_colour, 0.85))
    b = with_article(r, thing(r, emoji.words[scene.second], None, 0.85))
    return pair(r, a, b, scene.layout)


def on_ground(r, text, ground):
    if ground is None:
        return text
    return r.choice(["{t} on a {g} background", "{t} on a {g} background", "{t} on {g}", "{t} with a {g} background", "{t}, {g} background",
                     "{g} background, {t}", "{t} in front of a {g} wall", "{t} against {g}"]).format(t=text, g=ground)


def lead_in(r):
    u = r.random()
    if u < 0.45:
        return ""
    if u < 0.6:
        return r.choice(["a ", "the ", "my "]) + r.choice(ADJECTIVE)
    of = r.choice(["a ", "an ", "the ", ""]) + r.choice(WHAT) + " of "
    if u < 0.75:
        return of
    ask = r.choice(ASK) + r.choice(VERB) + r.choice(WHOM)
    return ask + (of if u > 0.9 else r.choice(["", "", "a ", "the "]) + (r.choice(ADJECTIVE) if r.random() < 0.3 else ""))


def errand(r, emoji, text):
    """The text within a request whose other words may mean anything: "please WORD a cat for my WORD"."""
    word = lambda: r.choice(emoji.vocabulary if r.random() < 0.6 else emoji.filler)
    if not text.startswith(("a ", "an ", "the ", "one ")):
        text = r.choice(["", "a ", "the ", "my "]) + text
    lead = r.choice(ASK) + r.choice(["{w} ", "{w} ", "{w} me ", "{w} us ", "{w} for me ", "help me {w} ", "try to {w} "]).format(w=word())
    tail = r.choice(["", "", "?", "!", " please", " for my {w}", " for my {w}", " for the {w}", " for our {w}", " for a {w}", " for her {w}",
                     " for {w}", ", {w}", ", {w} style", " as a {w}", " like my {w}", " before {w}", " because of {w}"]).format(w=word())
    return lead + text + tail


def as_typed(r, text):
    """With the slips and capitals of people."""
    if r.random() < 0.15:
        text = typo(r, text)
    u = r.random()
    if u < 0.15:
        return text[0].upper() + text[1:]
    return text.upper() if u < 0.23 else text.title() if u < 0.28 else text


def scene_prompt(r, emoji, scene):
    """One random wording of a scene."""
    if scene.is_plain() and r.random() < 0.12:
        return emoji.words[scene.first]["name"]
    text = on_ground(r, body(r, emoji, scene), scene.ground)
    u = r.random()
    if u < 0.25:
        return text
    if u < 0.45:
        s = errand(r, emoji, text)
    else:
        s = lead_in(r) + text + (r.choice(TAIL) if r.random() < 0.4 else "")
    if r.random() < 0.3:
        w = [junk(r, emoji.filler) for _ in range(r.randint(1, 4))]
        k = r.randint(0, len(w))
        s = " ".join(w[:k] + [s] + w[k:])
    return as_typed(r, s)


RECOLOUR = ["make it {c}", "make this {c}", "make it {c}", "turn it {c}", "recolour it {c}", "recolor it in {c}", "colour it {c}", "in {c}", "the same in {c}",
            "change the colour to {c}", "change its color to {c}", "now in {c}", "give it a {c} colour", "the same but {c}", "it should be {c}",
            "this in {c}", "a {c} one", "make the object {c}", "dye it {c}"]
NEW_GROUND = ["put it on a {g} background", "on a {g} background", "change the background to {g}", "with a {g} background", "make the background {g}",
              "{g} background", "place it in front of a {g} wall", "the same on {g}", "set it against {g}", "put this on {g}", "a {g} background behind it"]
TOGETHER = ["put them beside each other", "both together", "combine them", "side by side", "both of them", "the first left of the second",
            "put the first one to the left of the second one", "both in one picture", "put these two next to each other", "join the two",
            "the first and the second", "these two side by side", "show both", "put them together"]


def edit_prompt(r, scene):
    """One random wording of what is to be done with the reference pictures."""
    asked = [r.choice(TOGETHER)] if scene.second is not None else []
    if scene.first_colour:
        asked.append(r.choice(RECOLOUR).format(c=scene.first_colour))
    if scene.ground:
        asked.append(r.choice(NEW_GROUND).format(g=scene.ground))
    s = r.choice([" and ", ", ", " and ", " "]).join(asked)
    return as_typed(r, r.choice(["", "", "", "", "please ", "now ", "can you ", "just "]) + s + r.choice(["", "", "", "", " please", ".", "!"]))


def unknown_prompt(r, emoji):
    """Words that name nothing that could be drawn."""
    return lead_in(r) + " ".join(junk(r, emoji.filler) for _ in range(r.randint(1, 6)))
