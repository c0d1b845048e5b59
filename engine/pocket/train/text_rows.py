"""Rows of the text encoder as the pipeline makes them, without computing all 512.

The pipeline pads the templated prompt to 512 ids. Row i sees the real ids j <= i only, so a padding row depends on the prompt and on
its own position, on nothing else. A short batch with `width` leading positions and `extra` padding rows at chosen later positions
gives exactly the rows that the computation of all 512 gives there.

Of a scene with two objects the rows before SECOND_FROM tell the first and those from it on the second, both in the same way: so the
transformer draws either with what it knows of one, and only selects whose rows a part of the picture listens to. Half of the rows for
each keeps that selection easy.
"""
import torch

HEAD, FOOT = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
TAPS = (9, 18, 27)
ROWS = 512                      # of the pipeline
SECOND_FROM = 256
HEAD_TOKENS, FOOT_TOKENS = 3, 9


class TextRows:
    def __init__(self, tokenizer):
        self.tokenizer, self.pad = tokenizer, tokenizer.convert_tokens_to_ids("<|endoftext|>")

    def ids(self, prompts):
        return [e.ids for e in self.tokenizer.backend_tokenizer.encode_batch([HEAD + p + FOOT for p in prompts])]

    def batch(self, prompts, r, first, second, widest, narrowest=0):
        """ids [B, rows], real [B, rows], positions [rows]: the leading rows, `first` padding rows before SECOND_FROM and `second` from
        it on. There are as many leading rows as the longest prompt has, between `narrowest` and `widest`; a prompt over `widest` ids
        loses its middle."""
        ids, extra = self.ids(prompts), first + second
        width = max(narrowest, min(widest, -(-max(map(len, ids)) // 4) * 4))
        rows = torch.full((len(prompts), width + extra), self.pad)
        for i, t in enumerate(ids):
            if len(t) > width:
                t = t[:width - FOOT_TOKENS] + t[-FOOT_TOKENS:]
            rows[i, :len(t)] = torch.tensor(t)
        padding = sorted(r.sample(range(width, SECOND_FROM), first)) + sorted(r.sample(range(SECOND_FROM, ROWS), second))
        return rows, rows != self.pad, torch.tensor([*range(width), *padding])


def hidden_states(encoder, ids, real, positions, only=None):
    """Residual stream [B, rows, width] after 9, 18 and 27 layers; `only` names the layers to run (default: all)."""
    model, rows = encoder.model, ids.shape[1]
    mask = (torch.ones(rows, rows, dtype=torch.bool).tril() & real[:, None, :])[:, None]
    h = model.embed_tokens(ids)
    rope = model.rotary_emb(h, positions[None])
    out = []
    for i, layer in enumerate(model.layers[:TAPS[-1]]):
        if only is None or i in only:
            h = layer(h, attention_mask=mask, position_embeddings=rope, position_ids=positions[None])
        if i + 1 in TAPS:
            out.append(h)
    return out
