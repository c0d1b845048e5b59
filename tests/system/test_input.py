"""Bad input: each is refused with a sentence that names the thing, what was found and what is accepted, and leaves nothing.

Whatever gets through here is a night of failures, or a file outside the folder it belongs to."""

import json

import pytest
from PIL import Image

from farm import ROOT

LONG = "word " * 600
KEPT = "red heart\n"

NAMES = [("a/b", "/"), ("..", "."), (".hidden", "."), ("two words", " "), ("fox🦊", "🦊"), ("ж", "ж"), ("tab\there", "0x09"), ("", "empty"),
         ("x" * 101, "100"), ("a\nb", "0x0a")]

FILES = [
    # name, suffix, bytes, what the sentence must say
    ("nul", "txt", b"fox\nred\0heart\n", ["nul.txt:2", "NUL"]),
    ("latin1", "txt", b"fox\nowl\ncaf\xe9\n", ["latin1.txt:3", "0xe9", "UTF-8"]),
    ("surrogate", "txt", b"\xed\xa0\x80\n", ["surrogate.txt:1", "UTF-8"]),
    ("utf16", "txt", "fox\n".encode("utf-16"), ["UTF-16"]),
    ("huge-line", "txt", b"fox\n" + b"x" * (1 << 20) + b"\n", ["huge-line.txt:2", "65536"]),
    ("huger-line", "txt", b"fox\n" + b"x" * (64 << 20) + b"\n", ["huger-line.txt:2", "longer"]),
    ("nothing", "txt", b"", ["no prompts"]),
    ("comments", "txt", b"# only\n\n", ["no prompts"]),
    ("unbalanced", "csv", b'prompt,seed\nfox,1\n"owl,2\nbear,3\n', ["unbalanced.csv:3", "unbalanced quotes"]),
    ("stray-quote", "csv", b'prompt,seed\nfo"x,1\n', ["stray-quote.csv:2"]),
    ("too-many", "csv", b"prompt,seed\nfox,1\nred, blue,2\n", ["too-many.csv:3", "3 fields", "2"]),
    ("two-columns", "csv", b"prompt,seed,Prompt\nfox,1,owl\n", ["two-columns.csv:1", "columns 1 and 3", "Prompt"]),
    ("no-prompt", "csv", b"text,seed\nfox,1\n", ["no-prompt.csv:1", "prompt"]),
    ("empty-prompt", "csv", b"prompt,seed\nfox,1\n,2\n", ["empty-prompt.csv:3", "empty"]),
    ("not-json", "jsonl", b'{"prompt":"fox"}\n{"prompt":\n', ["not-json.jsonl:2", "JSON"]),
    ("twice-json", "jsonl", b'{"prompt":"fox","Prompt":"owl"}\n', ["twice-json.jsonl:1", "prompt"]),
    ("list-json", "jsonl", b'["fox"]\n', ["list-json.jsonl:1", "object"]),
    ("odd-width", "csv", b"prompt,width,height\nfox,65,64\n", ["odd-width.csv:2", "65", "16"]),
    ("small", "csv", b"prompt,width,height\nfox,48,64\n", ["small.csv:2", "48", "64"]),
    ("huge", "csv", b"prompt,width,height\nfox,4096,4096\n", ["huge.csv:2", "4096"]),
    ("no-steps", "csv", b"prompt,steps\nfox,0\n", ["no-steps.csv:2", "0", "1"]),
    ("big-seed", "csv", b"prompt,seed\nfox,18446744073709551616\n", ["big-seed.csv:2", "18446744073709551616", "18446744073709551615"]),
    ("big-seed-json", "jsonl", b'{"prompt":"fox","seed":18446744073709551616}\n', ["big-seed-json.jsonl:1", "18446744073709551616"]),
    ("minus-seed", "jsonl", b'{"prompt":"fox","seed":-1}\n', ["minus-seed.jsonl:1", "-1"]),
    ("nan", "csv", b"prompt,guidance\nfox,nan\n", ["nan.csv:2", "nan"]),
    ("path-name", "jsonl", b'{"prompt":"fox","name":"../../etc/passwd"}\n', ["path-name.jsonl:1", "../../etc/passwd"]),
    ("long-prompt", "txt", KEPT.encode() + LONG.encode() + b"\n", ["long-prompt.txt:2", "512"]),
    ("no-negative", "csv", b"prompt,negative\nfox,\nowl,blurry\n", ["no-negative.csv:3", "model 'speck' is distilled", "base model"]),
    ("an-image", "csv", b"prompt,image\nfox,cat.png\n", ["an-image.csv:2", "image"]),
]

def test_what_is_no_column_is_named_as_a_label_and_comes_back(farm):
    """A misspelt column is one of them: it must be seen before a night is over."""
    path = farm.file("labels.csv", "prompt,size,shelf,sede\nfox,64x64,upper,7\n")
    run = farm.run("submit", path, "--campaign", "labels", "--steps", "1", "--wait")
    assert "labels: shelf, sede" in run.stdout
    (image,) = farm.assert_whole("labels", 1)
    assert image["labels"] == {"shelf": "upper", "sede": "7"} and (image["width"], image["height"]) == (64, 64)
    rows = farm.file("labels.jsonl", '{"prompt":"fox","tag":1}\n{"prompt":"owl","tag":2,"x":null}\n')
    assert "labels: tag, x" in farm.run("submit", rows, "--campaign", "labels", "--dry-run").stdout


OPTIONS = [
    (["--size", "100x64"], "100"), (["--size", "64"], "64"), (["--size", "32x32"], "32"), (["--size", "8192x8192"], "8192"),
    (["--steps", "0"], "0"), (["--steps", "1001"], "1001"), (["--guidance", "-1"], "-1"), (["--seed", "18446744073709551616"], "18446744073709551616"),
    (["--seeds", "0"], "0"), (["--format", "gif"], "gif"), (["--use", "personal"], "personal"), (["--priority", "9999"], "9999"),
    (["--out", "s3://bucket/x"], "s3://"), (["--out", "/nonexistent/deep/folder"], "/nonexistent/deep/folder"), (["--lora", "x"], "x"),
    (["--colour", "red"], "--colour"),
]


@pytest.mark.parametrize("name, said", NAMES, ids=[repr(n[0][:12]) for n in NAMES])
def test_a_campaign_name_that_is_no_plain_word_is_refused(farm, name, said):
    """Names become folders, labels and words of a command line."""
    farm.refuses("submit", farm.file("good.txt", KEPT), "--campaign", name, said=said)


@pytest.mark.parametrize("name, suffix, content, said", FILES, ids=[f[0] for f in FILES])
def test_a_bad_file_is_refused_by_line_and_leaves_nothing(farm, name, suffix, content, said):
    """The good rows before the bad one must not be in the queue: people correct the file and submit it again."""
    path = farm.file(f"{name}.{suffix}", content)
    farm.refuses("submit", path, "--campaign", name, "--size", "64x64", said=said)
    farm.run("status", name, code=2)
    assert not farm.folder(name).exists()


@pytest.mark.parametrize("words, said", OPTIONS, ids=["=".join(o[0]) for o in OPTIONS])
def test_a_bad_option_is_refused_by_name(farm, words, said):
    """Nothing is clamped: what was asked for cannot be had, and it says so."""
    size = [] if "--size" in words else ["--size", "64x64"]
    farm.refuses("submit", farm.file("good.txt", KEPT), "--campaign", "options", *size, *words, said=said)
    farm.run("status", "options", code=2)


def test_a_base_model_takes_a_negative_prompt_that_is_not_too_long(new_farm):
    """What its distilled twin refuses is half of how it is used."""
    farm = new_farm(ROOT / "tests/golden/models/base", name="base")
    farm.up()
    rows = farm.file("rows.csv", f"prompt,negative\nfox,blurry\nowl,{LONG}\n")
    farm.refuses("submit", rows, "--campaign", "base", "--size", "64x64", said=["rows.csv:3", "negative prompt has 614 tokens", "512"])
    farm.run("submit", "-", "--campaign", "base", "--size", "64x64", "--negative", "blurry", "--dry-run", stdin="fox\n")


def test_all_mistakes_of_a_file_are_told_at_once_up_to_ten(farm):
    """Who corrects a file of a thousand rows should not submit it a thousand times."""
    rows = ["prompt,steps"] + [f"fox {n},{0 if n % 2 else 1}" for n in range(2, 40)]  # every odd line is wrong
    for last, told, end in [(5, [3, 5], "2 mistakes; nothing was added"), (39, range(3, 22, 2), "9 more mistakes like these; nothing was added")]:
        run = farm.run("submit", farm.file("many.csv", "\n".join(rows[:last]) + "\n"), "--campaign", "many", "--size", "64x64", code=2)
        lines = run.stderr.splitlines()
        assert [line.split("many.csv:")[1].split(":")[0] for line in lines[:-1]] == [str(n) for n in told] and lines[-1].endswith(end), run.stderr
        assert all("steps" in line for line in lines[:-1]) and run.stdout == ""
    farm.run("status", "many", code=2)


def test_a_table_on_standard_input_is_not_taken_for_prompts(farm):
    """A campaign of "fox,1" and "owl,2" is not what was meant."""
    farm.refuses("submit", "-", "--campaign", "table", "--size", "64x64", stdin="prompt,seed\nfox,1\n", said=["stdin:1:", "--input-format csv"])
    farm.run("submit", "-", "--campaign", "table", "--size", "64x64", "--input-format", "csv", "--dry-run", stdin="prompt,seed\nfox,1\n")


def test_a_file_that_is_not_there_or_is_a_folder_is_refused(farm):
    """A typo in a path must not be an empty campaign."""
    farm.refuses("submit", "/nonexistent/p.txt", "--campaign", "x", said="/nonexistent/p.txt")
    farm.refuses("submit", farm.root, "--campaign", "x", said=str(farm.root))


def test_windows_files_are_read_as_they_were_meant(farm):
    """BOM and CRLF are how half of the world's spreadsheets save."""
    farm.submit("crlf-txt", b"\xef\xbb\xbfred heart\r\nblue star\r\n", "--wait")
    assert [i["prompt"] for i in farm.images("crlf-txt")] == ["red heart", "blue star"]
    farm.submit("crlf-csv", b"\xef\xbb\xbfprompt,seed\r\n\"red, heart\",5\r\nowl,6\r\n", "--wait", suffix="csv")
    assert [(i["prompt"], i["seed"]) for i in farm.images("crlf-csv")] == [("red, heart", 5), ("owl", 6)]
    farm.submit("plain-txt", "red heart\nblue star\n", "--wait")
    assert [i["seed"] for i in farm.images("plain-txt")] == [i["seed"] for i in farm.images("crlf-txt")], "line ends are not part of a prompt"


def test_a_long_prompt_is_cut_only_when_asked_and_that_is_recorded(farm):
    """A prompt that is cut silently is another picture than the one asked for."""
    farm.submit("cut", LONG + "\nfox\n", "--truncate", "--wait")
    images = farm.assert_whole("cut", 2)
    records = [json.loads(Image.open(i["path"]).text["kiln"]) for i in images]
    assert records[0]["truncated"] is True and not records[1].get("truncated", False)
    assert images[0]["prompt"] == LONG.strip(), "the row keeps what was asked for"


def test_a_refused_file_does_not_disturb_what_runs(farm):
    """One person's mistake is nobody else's."""
    farm.submit("steady", "\n".join(f"bird {i}" for i in range(30)) + "\n")
    for _ in range(5):
        farm.refuses("submit", farm.file("bad.csv", b"prompt,steps\nfox,0\n"), "--campaign", "steady", "--size", "64x64", said="bad.csv:2")
    farm.wait_done("steady")
    farm.assert_whole("steady", 30)
