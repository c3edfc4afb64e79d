#!/usr/bin/env python3
"""Trains the model that Lacuna embeds: a small ReLU-gated Llama with its own vocabulary, from random initialisation.

Needs PyTorch, tokenizers and safetensors. Deterministic up to the arithmetic of the machine (seeds fixed).

    python3 tools/train_embedded.py --data ../shared/data --out OUT            # tokenizer, training, card
    python3 tools/train_embedded.py --data ../shared/data --out OUT --eval     # bits per byte of OUT on the held-out stories

Text: stories-sampled, tinystories-more, the first 1,000 stories of tinystories-sample, a slice of gutenberg.
Never seen: the last 300 stories of tinystories-sample, on which the figures of the card are measured.

Sparsity: an L1 penalty on relu(gate), whose weight follows a feedback loop so that the share of open neurons falls
along a half cosine (in the logarithm) from its free value to --share (the idea of ProSparse, arXiv:2402.13516; the
feedback is ours). Optimiser: Muon (momentum, orthogonalised by five Newton-Schulz steps) for the matrices of the
blocks, AdamW for the rest.
"""
import argparse, gzip, json, math, os, pathlib, random, time

import torch
import torch.nn.functional as F

END = "<|endoftext|>"
HELD_OUT = 300


def stories(path, mark):
    raw = gzip.open(path, "rt", encoding="utf-8").read() if str(path).endswith(".gz") else open(path, encoding="utf-8").read()
    return [s.strip() for s in raw.split(mark) if s.strip()]


def corpus(data):
    """(training documents, held-out documents): the last 300 of tinystories-sample are held out."""
    sample = stories(data / "tinystories-sample/stories.txt", END)
    docs = sample[:1000] * 2 + stories(data / "tinystories-more/stories.txt", END) * 2
    for part in sorted((data / "stories-sampled").glob("*.gz")):
        docs += stories(part, "<|endofstory|>")
    books = stories(data / "gutenberg/train-00.txt.gz", "<|endofbook|>")
    paragraphs = [p for b in books for p in b.split("\n\n") if len(p) > 80]
    text, size = [], 0
    random.Random(1).shuffle(paragraphs)
    for p in paragraphs:
        text.append(p)
        size += len(p)
        if size > 1_200_000:
            break
    return docs, text, sample[-HELD_OUT:]


def train_tokenizer(docs, path):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    tok.train_from_iterator(docs, trainers.BpeTrainer(
        vocab_size=4096, special_tokens=[END], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    tok.post_processor = processors.TemplateProcessing(single=f"{END} $A", special_tokens=[(END, 0)])
    tok.save(str(path))


class Shape:
    vocab, width, layers, heads, kv_heads, head, inner, context = 4096, 256, 6, 4, 2, 64, 896, 512
    eps, theta = 1e-5, 10000.0


class Block(torch.nn.Module):
    def __init__(self, s):
        super().__init__()
        lin = lambda i, o: torch.nn.Linear(i, o, bias=False)
        self.n1, self.n2 = torch.nn.Parameter(torch.ones(s.width)), torch.nn.Parameter(torch.ones(s.width))
        self.q, self.k, self.v = lin(s.width, s.heads * s.head), lin(s.width, s.kv_heads * s.head), lin(s.width, s.kv_heads * s.head)
        self.o = lin(s.heads * s.head, s.width)
        self.gate, self.up, self.down = lin(s.width, s.inner), lin(s.width, s.inner), lin(s.inner, s.width)

    def forward(self, x, cos, sin, s):
        b, n, _ = x.shape
        h = F.rms_norm(x, (s.width,), self.n1, s.eps)
        q = rope(self.q(h).view(b, n, s.heads, s.head).transpose(1, 2), cos, sin)
        k = rope(self.k(h).view(b, n, s.kv_heads, s.head).transpose(1, 2), cos, sin)
        v = self.v(h).view(b, n, s.kv_heads, s.head).transpose(1, 2)
        r = s.heads // s.kv_heads
        k, v = k.repeat_interleave(r, 1), v.repeat_interleave(r, 1)
        a = attention(q, k, v)
        x = x + self.o(a.transpose(1, 2).reshape(b, n, -1))
        h = F.rms_norm(x, (s.width,), self.n2, s.eps)
        g = F.relu(self.gate(h))
        return x + self.down(g * self.up(h)), g.float().mean(), (g > 0).float().mean()


def attention(q, k, v):
    """Plain causal attention: at these sizes its backward pass is four times faster on a CPU than the fused one."""
    n = q.shape[2]
    s = (q @ k.transpose(-1, -2)) * (1 / math.sqrt(q.shape[-1]))
    s = s.masked_fill(torch.ones(n, n, dtype=torch.bool).triu(1), float("-inf"))
    return s.softmax(-1).to(v.dtype) @ v


def rope(x, cos, sin):
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


class Model(torch.nn.Module):
    def __init__(self, s=Shape):
        super().__init__()
        self.s = s
        self.embed = torch.nn.Embedding(s.vocab, s.width)
        self.blocks = torch.nn.ModuleList(Block(s) for _ in range(s.layers))
        self.norm = torch.nn.Parameter(torch.ones(s.width))
        for p in self.parameters():
            if p.dim() == 2:
                torch.nn.init.normal_(p, std=0.02)
        for b in self.blocks:
            torch.nn.init.normal_(b.o.weight, std=0.02 / math.sqrt(2 * s.layers))
            torch.nn.init.normal_(b.down.weight, std=0.02 / math.sqrt(2 * s.layers))
        t = torch.arange(s.context).float()[:, None] * s.theta ** (-torch.arange(0, s.head, 2).float() / s.head)[None]
        self.register_buffer("cos", t.cos(), persistent=False)
        self.register_buffer("sin", t.sin(), persistent=False)

    def forward(self, ids):
        x = self.embed(ids)
        n = ids.shape[1]
        cos, sin = self.cos[:n].to(x.dtype), self.sin[:n].to(x.dtype)
        l1, share = 0.0, []
        for b in self.blocks:
            x, pen, open_ = b(x, cos, sin, self.s)
            l1 = l1 + pen
            share.append(open_)
        x = F.rms_norm(x, (self.s.width,), self.norm, self.s.eps)
        return F.linear(x, self.embed.weight), l1, torch.stack(share)


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalised by five Newton-Schulz steps (K. Jordan, 2024)."""
    def __init__(self, params, lr, momentum=0.95, decay=0.05):
        super().__init__(params, dict(lr=lr, momentum=momentum, decay=decay))

    @torch.no_grad()
    def step(self):
        for g in self.param_groups:
            for p in g["params"]:
                st = self.state[p]
                m = st.setdefault("m", torch.zeros_like(p))
                m.lerp_(p.grad, 1 - g["momentum"])
                u = p.grad.lerp(m, g["momentum"]).bfloat16()
                flip = u.shape[0] > u.shape[1]
                u = u.T if flip else u
                u = u / (u.norm() + 1e-7)
                for _ in range(5):
                    a = u @ u.T
                    u = 3.4445 * u + (-4.7750 * a + 2.0315 * a @ a) @ u
                u = u.T if flip else u
                p.mul_(1 - g["lr"] * g["decay"])
                p.add_(u.float(), alpha=-g["lr"] * max(1, p.shape[0] / p.shape[1]) ** 0.5)


def batches(docs, tok, tokens_per_step, seed, row_of):
    """Documents shuffled each pass, concatenated with their start tokens, cut into rows."""
    ids = [e.ids for e in tok.encode_batch(docs)]
    print(f"{len(docs)} documents, {sum(map(len, ids)) / 1e6:.2f}M tokens per pass", flush=True)
    rng, buf = random.Random(seed), []
    while True:
        row = row_of()
        need = tokens_per_step + 1
        while len(buf) < need:
            order = list(range(len(ids)))
            rng.shuffle(order)
            for i in order:
                buf.extend(ids[i])
        x = torch.tensor(buf[:need])
        buf = buf[tokens_per_step:]
        yield x[:-1].view(-1, row), x[1:].view(-1, row)


@torch.no_grad()
def held_out(model, tok, docs):
    """Each story on its own with the start token, cut to the context; (bits/byte, perplexity, open share per layer)."""
    model.eval()
    nats, count, size, share, n = 0.0, 0, 0, 0, 0
    for d in docs:
        ids = tok.encode(d).ids[:Shape.context]
        logits, _, s = model(torch.tensor([ids]))
        nats += F.cross_entropy(logits[0, :-1].float(), torch.tensor(ids[1:]), reduction="sum").item()
        count += len(ids) - 1
        size += len(tok.decode(ids[1:]).encode())
        share, n = share + s, n + 1
    model.train()
    return nats / size / math.log(2), math.exp(nats / count), (share / n).tolist()


def names():
    for i in range(Shape.layers):
        p, q = f"blocks.{i}.", f"model.layers.{i}."
        yield p + "n1", q + "input_layernorm.weight"
        yield p + "n2", q + "post_attention_layernorm.weight"
        for a in "qkvo":
            yield f"{p}{a}.weight", f"{q}self_attn.{a}_proj.weight"
        for a in ("gate", "up", "down"):
            yield f"{p}{a}.weight", f"{q}mlp.{a}_proj.weight"
    yield "embed.weight", "model.embed_tokens.weight"
    yield "norm", "model.norm.weight"


def export(model, out, card):
    from safetensors.torch import save_file
    sd = model.state_dict()
    save_file({hf: sd[ours].bfloat16().contiguous() for ours, hf in names()}, out / "model.safetensors", metadata={"format": "pt"})
    s = Shape
    cfg = dict(architectures=["LlamaForCausalLM"], model_type="llama", hidden_act="relu", hidden_size=s.width, intermediate_size=s.inner,
               num_hidden_layers=s.layers, num_attention_heads=s.heads, num_key_value_heads=s.kv_heads, head_dim=s.head, vocab_size=s.vocab,
               max_position_embeddings=s.context, rms_norm_eps=s.eps, rope_theta=s.theta, tie_word_embeddings=True, attention_bias=False,
               mlp_bias=False, bos_token_id=0, eos_token_id=0, torch_dtype="bfloat16")
    (out / "config.json").write_text(json.dumps(cfg, indent=1) + "\n")
    (out / "generation_config.json").write_text(json.dumps(dict(bos_token_id=0, eos_token_id=0), indent=1) + "\n")
    (out / "tokenizer_config.json").write_text(json.dumps(dict(
        tokenizer_class="PreTrainedTokenizerFast", bos_token=END, eos_token=END, model_max_length=s.context, clean_up_tokenization_spaces=False), indent=1) + "\n")
    (out / "card.json").write_text(json.dumps(card, indent=1) + "\n")


def learning_rate(step, steps, warm, hold=0.35):
    """Warm-up, constant until `hold` of the run, then a straight line down to 3 %."""
    if step < warm:
        return (step + 1) / warm
    return 1.0 if step < hold * steps else 0.03 + 0.97 * (steps - step) / (steps * (1 - hold))


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("--data", type=pathlib.Path, required=True)
    ap.add_argument("--out", type=pathlib.Path, required=True)
    ap.add_argument("--steps", type=int, default=9000)
    ap.add_argument("--tokens", type=int, default=4096, help="tokens per step")
    ap.add_argument("--row", type=int, default=256, help="row length; the last --long share of the run uses the whole context")
    ap.add_argument("--long", type=float, default=0.2)
    ap.add_argument("--lr", type=float, default=0.02, help="Muon")
    ap.add_argument("--lr-adam", type=float, default=3e-3)
    ap.add_argument("--share", type=float, default=0.09, help="share of open neurons to end with")
    ap.add_argument("--ramp-from", type=float, default=0.3)
    ap.add_argument("--ramp-to", type=float, default=0.75)
    ap.add_argument("--threads", type=int, default=1)
    ap.add_argument("--seed", type=int, default=7)
    ap.add_argument("--eval", action="store_true")
    args = ap.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    docs, prose, test = corpus(args.data)
    tok_path = args.out / "tokenizer.json"
    if not tok_path.exists():
        train_tokenizer(docs + prose, tok_path)
    from tokenizers import Tokenizer
    tok = Tokenizer.from_file(str(tok_path))
    model = Model()
    if args.eval:
        from safetensors.torch import load_file
        sd = load_file(args.out / "model.safetensors")
        model.load_state_dict({ours: sd[hf].float() for ours, hf in names()})
        bpb, ppl, share = held_out(model, tok, test)
        print(f"bits/byte {bpb:.4f}  perplexity {ppl:.3f}  open {[round(x, 3) for x in share]}")
        return

    params = sum(p.numel() for p in model.parameters())
    print(f"{params / 1e6:.2f}M parameters", flush=True)
    mats = [p for b in model.blocks for p in b.parameters() if p.dim() == 2]
    rest = [p for n, p in model.named_parameters() if p.dim() != 2 or n.startswith("embed")]
    opts = [Muon(mats, args.lr), torch.optim.AdamW(rest, args.lr_adam, betas=(0.9, 0.98), weight_decay=0.0, fused=True)]
    base = [[g["lr"] for g in o.param_groups] for o in opts]
    steps, warm, step, row = args.steps, 100, 0, args.row
    data = batches(docs + prose, tok, args.tokens, args.seed, lambda: row)
    lam, free, target, t0, seen, log = 0.0, None, 1.0, time.time(), 0, []
    ema_loss, ema_share = None, 0.5
    state = args.out / "state.pt"
    if state.exists():
        st = torch.load(state, weights_only=False)
        model.load_state_dict(st["model"])
        for o, s in zip(opts, st["opts"]):
            o.load_state_dict(s)
        step, lam, free, seen, ema_share = st["step"], st["lam"], st["free"], st["seen"], st["ema_share"]
        print(f"resumed at step {step} of {steps}", flush=True)

    def losses(x, y):
        with torch.autocast("cpu", torch.bfloat16):
            logits, l1, share = model(x)
        return F.cross_entropy(logits.float().view(-1, Shape.vocab), y.reshape(-1)), l1, share

    forward = torch.compile(losses, dynamic=False)
    first = step
    for _ in range(first):  # a resumed run goes on in the text where it stopped
        next(data)
    while step < steps:
        scale = learning_rate(step, steps, warm)
        for o, bs in zip(opts, base):
            for g, b in zip(o.param_groups, bs):
                g["lr"] = b * scale
        row = Shape.context if step > steps * (1 - args.long) else args.row
        x, y = next(data)
        loss, l1, share = forward(x, y)
        (loss + lam * l1).backward()
        torch.nn.utils.clip_grad_norm_(rest, 1.0)
        for o in opts:
            o.step()
            o.zero_grad(set_to_none=True)
        open_ = share.mean().item()
        ema_share = 0.95 * ema_share + 0.05 * open_
        t = (step / steps - args.ramp_from) / (args.ramp_to - args.ramp_from)
        if t >= 0:
            free = free or ema_share
            target = args.share * (free / args.share) ** (0.5 * (1 + math.cos(math.pi * min(1, t))))
            # proportional control in the logarithm: too many open neurons, more penalty
            lam = min(5.0, max(lam, 0.01) * math.exp(0.02 * max(-1, min(1, math.log(ema_share / target) * 4))))
        seen += x.numel()
        ema_loss = loss.item() if ema_loss is None else 0.98 * ema_loss + 0.02 * loss.item()
        step += 1
        if step % 50 == 0:
            print(f"step {step}/{steps} loss {ema_loss:.4f} open {ema_share:.4f} target {target:.3f} lambda {lam:.4f} "
                  f"lr {scale:.3f} {(time.time() - t0) / (step - first) * 1e3:.0f} ms/step", flush=True)
        if step % 500 == 0 or step == steps:
            bpb, ppl, sh = held_out(model, tok, test if step == steps else test[:60])
            print(f"  held out: {bpb:.4f} bits/byte, perplexity {ppl:.3f}, open {sum(sh) / len(sh):.4f}", flush=True)
            log.append(dict(step=step, tokens=seen, bits_per_byte=round(bpb, 4), open=round(sum(sh) / len(sh), 4)))
            torch.save(dict(model=model.state_dict(), opts=[o.state_dict() for o in opts], step=step, lam=lam, free=free, seen=seen,
                            ema_share=ema_share), str(state) + ".tmp")
            os.replace(str(state) + ".tmp", state)
            export(model, args.out, dict(
                parameters=params, tokens_trained=seen, steps=step, tokens_per_step=args.tokens, seed=args.seed,
                bits_per_byte=round(bpb, 4), perplexity=round(ppl, 3), open_neurons=[round(v, 4) for v in sh],
                protocol="last 300 stories of tinystories-sample, each alone after the start token, cut to 512 tokens" if step == steps else "first 60 of them",
                history=log))
    print("done", flush=True)


if __name__ == "__main__":
    main()
