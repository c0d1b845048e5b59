#!/usr/bin/env python3
"""Pictures and words: Noto Color Emoji PNG files, Unicode names and keywords, WordNet synonyms -> emoji.npz

    data.py --pictures png/128 --annotations annotations/en.xml --groups emoji-test.txt --wordnet wordnet --out emoji.npz

Taken are emoji of one code point, without flags, skin tones and keycaps. emoji.npz holds `rgba` [n, 128, 128, 4] and `words` (JSON): for
each emoji its code point, name, CLDR keywords, WordNet synonyms and kinds ("dalmatian" for the dog), and a list of common English words
that mean no emoji.
"""
import argparse, collections, json, pathlib
import xml.etree.ElementTree as ET
import numpy as np
from PIL import Image

from scenes import halve
from wording import COLOURS, COUNTS, HELD_OUT_WORDS

COMMON_WORDS = 2500


def arguments():
    ap = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name in ("pictures", "annotations", "groups", "wordnet", "out"):
        ap.add_argument("--" + name, required=True, type=pathlib.Path)
    ap.add_argument("--small", type=pathlib.Path, help="folder that gets pictures.png and words.json for measure.py")
    return ap.parse_args()


def plain(text):
    """A name as somebody would type it."""
    return text.strip().replace("“", "").replace("”", "").replace("’", "'").replace(":", "")


def annotations(path):
    """{character: name}, {character: keywords} of one CLDR annotation file."""
    names, keywords = {}, {}
    for entry in ET.parse(path).getroot().iter("annotation"):
        char = entry.get("cp").replace("\ufe0f", "")
        if entry.get("type") == "tts":
            names[char] = plain(entry.text)
        else:
            keywords[char] = [plain(k) for k in entry.text.split("|")]
    return names, {c: [k for k in ks if k != names.get(c)] for c, ks in keywords.items()}


def wanted(path):
    """Characters of the emoji to learn, in the order of emoji-test.txt."""
    chars, group = [], ""
    for line in path.read_text("utf-8").splitlines():
        if line.startswith("# group:"):
            group = line.split(":")[1].strip()
        elif "; fully-qualified" in line:
            points = [int(p, 16) for p in line.split(";")[0].split() if p != "FE0F"]
            if len(points) == 1 and group != "Flags":
                chars.append(chr(points[0]))
    return chars


class WordNet:
    """Nouns of WordNet 3.0: synonyms of a word's first sense, and the direct kinds of it."""

    def __init__(self, folder):
        self.first, self.synset = {}, {}
        for line in (folder / "index.noun").read_text().splitlines():
            if not line.startswith(" "):
                f = line.split()
                self.first[f[0]] = f[-int(f[2])]
        for line in (folder / "data.noun").read_text().splitlines():
            if not line.startswith(" "):
                f = line.split()
                count = int(f[3], 16)
                words = [w.replace("_", " ").lower() for w in f[4:4 + 2 * count:2]]
                rest = f[5 + 2 * count:]
                self.synset[f[0]] = words, [rest[i + 1] for i, s in enumerate(rest) if s in ("~", "~i") and rest[i + 2] == "n"]

    def related(self, name):
        """(synonyms, kinds) of a name; both empty for a name that is no noun of WordNet."""
        sense = self.first.get(name.lower().replace(" ", "_"))
        if sense is None:
            return [], []
        words, below = self.synset[sense]
        kinds = [w for s in below for w in self.synset[s][0][:2]]
        good = lambda ws: [w for w in ws if w != name.lower() and w.replace(" ", "").replace("-", "").isalpha() and w.count(" ") < 2]
        return good(words), good(kinds)


def common_words(folder):
    """English words by how often WordNet's texts use them."""
    seen = collections.Counter()
    for line in (folder / "cntlist.rev").read_text().splitlines():
        key, _, count = line.split()
        seen[key.split("%")[0]] += int(count)
    return [w for w, _ in seen.most_common() if w.isalpha() and len(w) > 2]


def unique(lists, taken):
    """Each list without the words that are names, or stand in more than one of the lists."""
    count = collections.Counter(w for ws in lists for w in set(ws))
    return [sorted({w for w in ws if count[w] == 1 and w not in taken}) for ws in lists]


def picture(path):
    image = Image.open(path).convert("RGBA")
    page = Image.new("RGBA", (128, 128), (0, 0, 0, 0))
    image.thumbnail((128, 128), Image.LANCZOS)
    page.alpha_composite(image, ((128 - image.width) // 2, (128 - image.height) // 2))
    return np.asarray(page)


def write_small(folder, words, rgba):
    """What measure.py needs of all this: words.json, and pictures.png with 16x16 RGBA tiles in rows of 32."""
    small = np.stack([halve(halve(halve(x))) for x in rgba])
    page = np.zeros((-(-len(small) // 32) * 32, 16, 16, 4), np.uint8)
    page[:len(small)] = small
    sheet = page.reshape(-1, 32, 16, 16, 4).swapaxes(1, 2).reshape(-1, 32 * 16, 4)
    Image.fromarray(sheet).save(folder / "pictures.png", optimize=True)
    text = ",\n".join(json.dumps({k: m[k] for k in ("cp", "name", "keys")}, ensure_ascii=False) for m in words)
    (folder / "words.json").write_text("[\n" + text + "\n]\n", "utf-8")


def main():
    a = arguments()
    names, keywords = annotations(a.annotations)
    file = lambda c: a.pictures / f"emoji_u{ord(c):04x}.png"
    chars = [c for c in wanted(a.groups) if c in names and file(c).exists()]
    net = WordNet(a.wordnet)
    related = [net.related(names[c]) for c in chars]
    lower = {names[c].lower() for c in chars}
    keys = {k.lower() for c in chars for k in keywords.get(c, [])}
    synonyms = unique([r[0] for r in related], lower)
    kinds = unique([r[1] for r in related], lower | keys | {w for s in synonyms for w in s})
    words = [{"cp": f"{ord(c):X}", "name": names[c], "keys": keywords.get(c, []), "synonyms": s, "kinds": k}
             for c, s, k in zip(chars, synonyms, kinds)]
    used = {w for m in words for t in [m["name"], *m["keys"], *m["synonyms"], *m["kinds"]] for w in t.lower().split()}
    used |= set(COLOURS) | set(COUNTS) | HELD_OUT_WORDS
    filler = [w for w in common_words(a.wordnet) if w not in used and w.rstrip("s") not in used][:COMMON_WORDS]
    rgba = np.stack([picture(file(c)) for c in chars])
    np.savez_compressed(a.out, rgba=rgba, words=json.dumps({"emoji": words, "filler": filler}))
    if a.small:
        write_small(a.small, words, rgba)
    mean = lambda key: sum(len(m[key]) for m in words) / len(words)
    print(f"{len(words)} emoji, each with {mean('keys'):.1f} keywords, {mean('synonyms'):.1f} synonyms, {mean('kinds'):.1f} kinds; "
          f"{len(filler)} other words")


if __name__ == "__main__":
    main()
