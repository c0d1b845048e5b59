"""The transformer under BFL names: what single files, ComfyUI and GGUF call the tensors of the diffusers folder."""
import re

# diffusers module (a pattern) and its BFL name
BFL = [("x_embedder", "img_in"), ("context_embedder", "txt_in"), ("time_guidance_embed.timestep_embedder.linear_1", "time_in.in_layer"),
       ("time_guidance_embed.timestep_embedder.linear_2", "time_in.out_layer"), ("norm_out.linear", "final_layer.adaLN_modulation.1"),
       ("proj_out", "final_layer.linear"), (r"(.*_modulation.*)\.linear", r"\1.lin"),
       (r"single_transformer_blocks\.(\d+)\.attn\.to_qkv_mlp_proj", r"single_blocks.\1.linear1"),
       (r"single_transformer_blocks\.(\d+)\.attn\.to_out", r"single_blocks.\1.linear2"),
       (r"single_transformer_blocks\.(\d+)\.attn\.norm_(q|k)", r"single_blocks.\1.norm.\2"),
       (r"transformer_blocks\.(\d+)\.attn\.to_(q|k|v)", r"double_blocks.\1.img_attn.qkv.\2"),
       (r"transformer_blocks\.(\d+)\.attn\.add_(q|k|v)_proj", r"double_blocks.\1.txt_attn.qkv.\2"),
       (r"transformer_blocks\.(\d+)\.attn\.to_out\.0", r"double_blocks.\1.img_attn.proj"),
       (r"transformer_blocks\.(\d+)\.attn\.to_add_out", r"double_blocks.\1.txt_attn.proj"),
       (r"transformer_blocks\.(\d+)\.attn\.norm_(q|k)", r"double_blocks.\1.img_attn.norm.\2"),
       (r"transformer_blocks\.(\d+)\.attn\.norm_added_(q|k)", r"double_blocks.\1.txt_attn.norm.\2"),
       (r"transformer_blocks\.(\d+)\.ff\.linear_in", r"double_blocks.\1.img_mlp.0"),
       (r"transformer_blocks\.(\d+)\.ff\.linear_out", r"double_blocks.\1.img_mlp.2"),
       (r"transformer_blocks\.(\d+)\.ff_context\.linear_in", r"double_blocks.\1.txt_mlp.0"),
       (r"transformer_blocks\.(\d+)\.ff_context\.linear_out", r"double_blocks.\1.txt_mlp.2")]


def bfl_name(module):
    """BFL module name of a diffusers module; q, k and v come back as `...qkv.q` and so on."""
    for pattern, name in BFL:
        if re.fullmatch(pattern, module):
            return re.sub(pattern, name, module)
    raise KeyError(module)


def bfl_state(state, concatenate):
    """The transformer under BFL names: fused qkv, `.scale` norms, (shift, scale) order in the last modulation. concatenate
    joins arrays of whatever library along their first axis."""
    flat = {bfl_name(k.removesuffix(".weight")): v for k, v in state.items()}
    out = {}
    for k, v in flat.items():
        if k.endswith(".qkv.q"):
            out[k[:-2] + ".weight"] = concatenate([flat[k[:-1] + c] for c in "qkv"])
        elif re.search(r"\.norm\.[qk]$", k):
            out[k[:-1] + {"q": "query_norm", "k": "key_norm"}[k[-1]] + ".scale"] = v
        elif not re.search(r"\.qkv\.[kv]$", k):
            out[k + ".weight"] = concatenate([v[len(v) // 2:], v[:len(v) // 2]]) if "adaLN" in k else v
    return out
