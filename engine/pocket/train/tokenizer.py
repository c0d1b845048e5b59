#!/usr/bin/env python3
"""Train the pocket tokenizer: Qwen2's rules (split, byte alphabet, merges, 26 added tokens, chat template) with 2,048 ids.

    tokenizer.py --data emoji.npz --out tokenizer
"""
import argparse, json, pathlib, random
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from scene_bank import random_scene
from scenes import Emoji
from wording import scene_prompt

VOCABULARY = 2048
SPECIAL = ("<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|> <|box_end|> <|quad_start|> <|quad_end|> "
           "<|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|> <|video_pad|> <tool_call> </tool_call> <|fim_prefix|> <|fim_middle|> "
           "<|fim_suffix|> <|fim_pad|> <|repo_name|> <|file_sep|> <tool_response> </tool_response> <think> </think>").split()
PLAIN = {"<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>"}      # added, but not "special"
SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
TEMPLATE = ("{%- for message in messages %}{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
            "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}"
            "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}{%- endif %}")


def texts(emoji, r):
    out = ["user\n", "assistant\n", "\n\n"] * 4000
    for i, m in enumerate(emoji.words):
        out += [m["name"], " " + m["name"], m["name"].capitalize()] * 2 + [s + k for k in m["keys"] + m["synonyms"] for s in ("", " ")]
        out += [scene_prompt(r, emoji, random_scene(r, emoji, (128, 128), i)) for _ in range(4)]
    return out


def train(emoji, r):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(SPLIT), "isolated"),
                                                       pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(texts(emoji, r), trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(SPECIAL), min_frequency=2, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    assert tokenizer.get_vocab_size() == VOCABULARY - len(SPECIAL)
    tokenizer.add_tokens([AddedToken(s, special=s not in PLAIN, normalized=False) for s in SPECIAL])
    return tokenizer


def config(base):
    plain = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    added = {str(base + i): {"content": s, **plain, "special": s not in PLAIN} for i, s in enumerate(SPECIAL)}
    return {"tokenizer_class": "Qwen2Tokenizer", "add_prefix_space": False, "add_bos_token": False, "bos_token": None, "unk_token": None,
            "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "errors": "replace", "split_special_tokens": False,
            "clean_up_tokenization_spaces": False, "model_max_length": 512, "added_tokens_decoder": added}


def main():
    ap = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    ap.add_argument("--data", required=True, type=pathlib.Path)
    ap.add_argument("--out", required=True, type=pathlib.Path)
    ap.add_argument("--seed", type=int, default=0)
    a = ap.parse_args()
    tokenizer = train(Emoji(a.data), random.Random(a.seed))
    a.out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(a.out / "tokenizer.json"))
    model = json.loads((a.out / "tokenizer.json").read_text("utf-8"))["model"]
    base = VOCABULARY - len(SPECIAL)
    merges = [" ".join(m) if isinstance(m, list) else m for m in model["merges"]]
    (a.out / "merges.txt").write_text("".join(m + "\n" for m in merges), "utf-8")
    (a.out / "chat_template.jinja").write_text(TEMPLATE)
    files = {"vocab": model["vocab"], "added_tokens": {s: base + i for i, s in enumerate(SPECIAL)}, "tokenizer_config": config(base),
             "special_tokens_map": {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>",
                                    "additional_special_tokens": [s for s in SPECIAL if s not in PLAIN][1:]}}
    for name, value in files.items():
        (a.out / f"{name}.json").write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", "utf-8")
    print(f"tokenizer: {base} ids of text, {len(merges)} merges, {VOCABULARY} in all")


if __name__ == "__main__":
    main()
