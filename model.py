"""A small GPT, the log-probabilities it gives to a text, and its sampler.

Letters: B sequences, T tokens, V vocabulary, H heads, D width of a head, W width of the model.
Rows are a prompt from position 0, its response right after, then filler; a mask (B, T) says which ids are response tokens.
"""
import math
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


# --------------------------------------------------------------------------------------------------------------- the GPT
@dataclass
class GPTConfig:
    vocab_size: int    # V
    context: int       # the longest sequence, tokens
    layers: int
    heads: int
    width: int         # W; each head has W / heads


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Each pair of coordinates (i, i + D / 2) turned by its angle: (B, T, H, D), `rotations` (2, T, 1, D) -> (B, T, H, D)   Su et al. 2021

    The product of a query turned at s and a key turned at t depends on s - t alone.
    """
    half, (cos, sin) = x.shape[-1] // 2, rotation
    a, b, rest = x.split([half, half, x.shape[-1] - 2 * half], -1)
    return x * cos + torch.cat([b, a, rest], -1) * sin


def rotations(positions: int, size: int) -> Tensor:
    """Cosines and signed sines of each position and coordinate, (2, positions, 1, size); of an odd size the last is left as it is.

    Angles fall from 1 a position towards 1/1000 (usually 1/10,000): the texts are short.
    """
    angle = torch.arange(positions)[:, None, None] * 1000. ** (-torch.arange(size // 2) / (size // 2))
    return torch.stack([F.pad(torch.cat([angle.cos(), angle.cos()], -1), (0, size % 2), value=1.),
                        F.pad(torch.cat([-angle.sin(), angle.sin()], -1), (0, size % 2))])


def later(x: Tensor, start: int) -> Tensor:
    """What tokens at start..start+T-1 must not see: (B, T, W) -> (T, start + T), -inf where a token comes later, else 0."""
    T = x.shape[1]
    return torch.full((T, start + T), -math.inf, dtype=x.dtype, device=x.device).triu(start + 1)


class Attention(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.out = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor, rotation: Tensor, cache: Tensor | None, start: int) -> Tensor:
        """x (B, T, W) at positions start..start+T-1, whose rotation it is -> (B, T, W). A cache (2, B, H, context, D) is read and filled."""
        B, T, W = x.shape
        H, D = self.heads, W // self.heads
        qk, v = self.qkv(x).view(B, T, 3 * H, D).split([2 * H, H], 2)
        q, k = rotate(qk, rotation).chunk(2, 2)
        q, k, v = (heads.transpose(1, 2) for heads in (q, k, v))                                   # (B, H, T, D) each
        if cache is not None:
            cache[0, :, :, start:start + T], cache[1, :, :, start:start + T] = k, v
            k, v = cache[:, :, :, :start + T]                                                      # (B, H, start+T, D)
        y = torch.softmax(q * D ** -.5 @ k.transpose(-1, -2) + later(x, start), -1) @ v
        return self.out(y.transpose(1, 2).reshape(B, T, W))


class Block(nn.Module):
    """Pre-norm: x + attention(norm(x)), then x + mlp(norm(x)). No dropout anywhere: log-ratios must not be noisy."""
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.norm_1, self.attention = nn.LayerNorm(config.width), Attention(config)
        self.norm_2 = nn.LayerNorm(config.width)
        self.mlp = nn.Sequential(nn.Linear(config.width, 4 * config.width), nn.GELU(),
                                 nn.Linear(4 * config.width, config.width))

    def forward(self, x: Tensor, rotation: Tensor, cache: Tensor | None, start: int) -> Tensor:
        x = x + self.attention(self.norm_1(x), rotation, cache, start)
        return x + self.mlp(self.norm_2(x))


class GPT(nn.Module):
    """model(ids (B, T)) -> logits (B, T, V) at every position; the logits at t are for the token at t + 1."""
    def __init__(self, config: GPTConfig, generator: torch.Generator | None = None):
        super().__init__()
        self.config = config
        self.token = nn.Embedding(config.vocab_size, config.width)    # also the output matrix (tied)
        self.register_buffer("rotation", rotations(config.context, config.width // config.heads), persistent=False)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        for name, p in self.named_parameters():                       # GPT-2's initialisation, but for the tokens
            if p.dim() == 2:
                depth = (2 * config.layers) ** -.5 if name.endswith(("out.weight", "mlp.2.weight")) else 1.
                # SFT leaves words of one role where they began; had that been one place, nothing later could tell "superb" from "dull".
                nn.init.normal_(p, std=.2 if p is self.token.weight else .02 * depth, generator=generator)
            elif not name.endswith("weight"):
                nn.init.zeros_(p)                                     # biases; the norms' weights stay 1

    def hidden(self, ids: Tensor, caches: list[Tensor] | None = None, start: int = 0) -> Tensor:
        """ids (B, T) at positions start..start+T-1 -> last hidden states (B, T, W)."""
        assert start + ids.shape[1] <= self.config.context, \
            f"{start + ids.shape[1]} tokens do not fit into a context of {self.config.context}"
        x, rotation = self.token(ids), self.rotation[:, start:start + ids.shape[1]]
        for i, block in enumerate(self.blocks):
            x = block(x, rotation, caches[i] if caches else None, start)
        return self.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., W) -> (..., V)"""
        return F.linear(hidden, self.token.weight)

    def forward(self, ids: Tensor) -> Tensor:
        return self.logits(self.hidden(ids))


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the parameters, on the CPU: what is kept of a policy."""
    return {name: p.detach().cpu().clone() for name, p in model.state_dict().items()}


# ----------------------------------------------------------------------------------------------------- log-probabilities
def log_softmax(logits: Tensor) -> Tensor:
    """Over V, in float32 at least: a difference of log-probabilities in half precision is mostly rounding."""
    return F.log_softmax(logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits, dim=-1)


def token_logp(logits: Tensor, ids: Tensor) -> Tensor:
    """log pi(ids[t] | ids[<t]) for t = 1..T-1: logits (B, T, V), ids (B, T) -> (B, T-1).

    The off-by-one of all language models: the logits at t-1 predict the token at t. So entry t-1 of
    the result belongs to ids[t], the first token has no probability, and the last logits predict nothing that we have.
    """
    return log_softmax(logits[:, :-1]).gather(-1, ids[:, 1:, None]).squeeze(-1)


def sequence_logp(logits: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """log pi(y | x): logits (B, T, V), ids (B, T), mask (B, T) of response tokens -> (B,).

    A sum, not a mean: pi(y | x) is the product of its tokens' probabilities. What the mask leaves out is never read.
    """
    mask = mask.bool()
    read = F.pad(mask[:, 1:], (0, 1))[..., None]                       # position t-1 is read where ids[t] is scored
    logp = token_logp(logits.masked_fill(~read, 0.), ids.masked_fill(~mask, 0))
    return logp.masked_fill(~mask[:, 1:], 0.).sum(1)


def response_logits(model: GPT, ids: Tensor, mask: Tensor) -> Tensor:
    """The logits that predict the M response tokens (from one position before, see `token_logp`), row after row -> (M, V).

    The output matrix is a third of a small model's arithmetic; here it meets neither prompts nor filler.
    """
    return model.logits(model.hidden(ids[:, :-1])[mask[:, 1:]])


def response_logp(model: GPT, ids: Tensor, mask: Tensor) -> Tensor:
    """log-probability of each response token where it stands, 0 elsewhere: ids (B, T), mask (B, T) -> (B, T).

    Summed over T it is `sequence_logp(model(ids), ids, mask)`, at two thirds of the cost.
    """
    logits = response_logits(model, ids, mask)
    logp = -F.cross_entropy(logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits,
                            ids[mask], reduction="none")              # (M,)
    return torch.zeros(mask.shape, dtype=logp.dtype, device=ids.device).masked_scatter(mask, logp)


def token_kl(logits: Tensor, ref_logits: Tensor) -> Tensor:
    """KL(pi || pi_ref) of the next token over the whole vocabulary, nats: (..., V), (..., V) -> (...)."""
    logp, ref_logp = log_softmax(logits), log_softmax(ref_logits)
    return (logp.exp() * (logp - ref_logp)).sum(-1)


def sequence_kl(logits: Tensor, ref_logits: Tensor, mask: Tensor) -> Tensor:
    """Sum over a sampled response of the full-vocabulary KL at each step (footnote 3): (B, T, V) twice, (B, T) -> (B,), nats.

    Its mean over y ~ pi is the sequence KL(pi || pi_ref) = E[log pi(y|x) - log pi_ref(y|x)], as is that of the sampled
    log-ratio, but with less variance (the step's own token is integrated out).
    """
    read = F.pad(mask[:, 1:].bool(), (0, 1))[..., None]
    return token_kl(logits.masked_fill(~read, 0.), ref_logits.masked_fill(~read, 0.)).sum(1)    # 0 where not read


def response_kl(model: GPT, ref: GPT, ids: Tensor, mask: Tensor) -> Tensor:
    """`sequence_kl` of two models, with logits for response tokens alone: ids (B, T), mask (B, T) -> (B,), nats."""
    kl = token_kl(response_logits(model, ids, mask), response_logits(ref, ids, mask))            # (M,)
    return torch.zeros(mask.shape, dtype=kl.dtype, device=ids.device).masked_scatter(mask, kl).sum(1)


# -------------------------------------------------------------------------------------------- maximum likelihood (SFT)
def schedule(optimizer, steps: int):
    """Linear warm-up over the first tenth of the steps (App. B: 150 steps), then linear decay to 0."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min((s + 1) / (.1 * steps), (steps - s) / (.9 * steps), 1.))


def fit(model: GPT, ids: Tensor, lengths: Tensor, order: list[list[int]], lr: float) -> GPT:
    """SFT: -log p of each token given those before it, over batches of rows. ids (N, T), lengths (N,), order lists of rows."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(.9, .98), weight_decay=0., fused=True)
    decay, start, device = schedule(optimizer, len(order)), time.time(), next(model.parameters()).device
    for step, rows in enumerate(order, 1):
        width = int(lengths[rows].max())
        mask = torch.arange(width) < lengths[rows][:, None]
        mask[:, 0] = False                                             # nothing comes before the first token
        mask = mask.to(device)
        loss = -response_logp(model, ids[rows, :width].to(device), mask).sum() / mask.sum()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.)
        optimizer.step()
        decay.step()
        if step % max(len(order) // 5, 1) == 0:
            print(f"SFT step {step}/{len(order)}: {loss.item():.3f} nats a token, {time.time() - start:.0f} s", flush=True)
    return model


# ------------------------------------------------------------------------------------------------------------ the sampler
def draw(logits: Tensor, temperature: float, u: Tensor) -> Tensor:
    """One token a row by inverting the distribution function: logits (B, V), u (B,) uniform in [0, 1) -> (B,)."""
    if temperature == 0:
        return logits.argmax(-1)
    scaled = logits.float() if temperature == 1 else logits.float() / temperature    # a pass over (B, V) less where nothing changes
    cdf = torch.softmax(scaled, -1).cumsum(-1)
    token = torch.searchsorted(cdf, (u * cdf[:, -1])[:, None], right=True).squeeze(1)
    return token.clamp(max=logits.shape[1] - 1)


@torch.no_grad()
def sample(model: GPT, prompts: Tensor, prompt_lengths: Tensor, max_tokens: int, end: int, temperature: float = 1.,
           generator: torch.Generator | None = None, logp: Tensor | None = None) -> Tensor:
    """Responses from the model: prompts (B, P), prompt_lengths (B,) -> ids (B, T).

    Row b: its prompt from 0, its response right after (at most max_tokens, the end token included), then `end` as filler.
    All rows stand at the same position; while a row's prompt lasts, its next token is read from it rather than drawn, so
    prompts of different lengths need no padding on the left. Temperature 0 is argmax. T is about that of the longest row.
    Into `logp` (B, P + max_tokens), if there is one, goes the log-probability of each token that was drawn.
    """
    B, device = len(prompts), prompts.device
    T = int(prompt_lengths.max()) + max_tokens
    first = int(prompt_lengths.min())
    columns = torch.arange(T, device=device)
    ids = torch.full((B, T), end, device=device)
    ids[:, :prompts.shape[1]] = prompts[:, :T]
    ids = torch.where(columns < prompt_lengths[:, None], ids, end)
    rows, stop = torch.arange(B, device=device), prompt_lengths + max_tokens    # the rows still being written
    c = model.config
    caches = [torch.empty(2, B, c.heads, T, c.width // c.heads, dtype=model.token.weight.dtype, device=device)
              for _ in model.blocks]
    x, start, length = ids[:, :first], 0, prompt_lengths
    alive = torch.ones(B, dtype=torch.bool, device=device)
    for t in range(first, T):
        hidden = model.hidden(x, caches, start)[:, -1]                           # (rows, W)
        u = torch.rand(B, generator=generator, device=device)[rows]              # whichever rows have left the batch
        logits = model.logits(hidden)                                            # (rows, V)
        token = draw(logits, temperature, u)
        writing = alive & (t >= length)
        if logp is not None:
            logp[rows, t] = log_softmax(logits).gather(1, token[:, None]).squeeze(1).masked_fill(~writing, 0.)
        token = torch.where(writing, token, ids[rows, t])                        # a prompt's token, or filler
        ids[rows, t] = token
        alive &= ~(writing & (token == end)) & (t + 1 < stop)
        x, start = token[:, None], t
        if t % 4 == 0 and (keep := alive.nonzero().squeeze(1)).numel() < .8 * len(rows):
            if not len(keep):                                                    # rows that have ended leave the batch
                return ids[:, :t + 1]
            rows, x, length, stop, alive = rows[keep], x[keep], length[keep], stop[keep], alive[keep]
            caches = [cache[:, keep] for cache in caches]
    return ids


def response_mask(ids: Tensor, prompt_lengths: Tensor, max_tokens: int, end: int) -> Tensor:
    """Which ids are response tokens: from the prompt to the first end token, that included; ids (B, T) -> bool (B, T)."""
    columns = torch.arange(ids.shape[1], device=ids.device)
    response = (columns >= prompt_lengths[:, None]) & (columns < (prompt_lengths + max_tokens)[:, None])
    ended = ((ids == end) & response).int().cumsum(1)
    return response & (ended - ((ids == end) & response).int() == 0)


@torch.no_grad()
def respond(model: GPT, prompts: tuple[Tensor, Tensor], count: int, max_tokens: int, end: int, generator: torch.Generator,
            temperature: float = 1., batch: int = 2048) -> tuple[Tensor, Tensor]:
    """`count` responses to each prompt, in batches: ((N, P), (N,)) -> ids (N * count, P + max_tokens), mask of the same shape."""
    ids, lengths = (p.repeat_interleave(count, 0) for p in prompts)
    width = prompts[0].shape[1] + max_tokens
    rows = [sample(model, a, b, max_tokens, end, temperature, generator) for a, b in zip(ids.split(batch), lengths.split(batch))]
    ids = torch.cat([F.pad(row, (0, width - row.shape[1]), value=end) for row in rows])
    return ids, response_mask(ids, lengths, max_tokens, end)


def longest(mask: Tensor) -> int:
    """One past the last response token of all rows: what stands beyond is filler. mask (B, T)"""
    return int(mask.any(0).nonzero().max()) + 1


@torch.no_grad()
def score_batches(function, ids: Tensor, mask: Tensor, batch: int = 512) -> Tensor:
    """function(ids, mask) -> (B, ...) over many rows, in batches of like length, each cut to its longest: (N, T), (N, T) -> (N, ...)

    Where it gives something for each token, (B, T, ...), what was cut off is 0.
    """
    parts, order = [], mask.sum(1).argsort(stable=True)
    for rows in order.split(batch):
        width = longest(mask[rows])
        part = function(ids[rows, :width], mask[rows, :width])
        if part.dim() > 1:
            part = torch.cat([part, part.new_zeros(len(rows), mask.shape[1] - width, *part.shape[2:])], 1)
        parts.append(part)
    return torch.cat(parts)[order.argsort()]


def log_probabilities(model: GPT, ids: Tensor, mask: Tensor, device: str | None = None) -> Tensor:
    """log pi(y|x) of many responses, in batches, without gradient: ids (N, T), mask (N, T) -> (N,) on the CPU"""
    with torch.no_grad():
        return score_batches(lambda a, b: response_logp(model, a, b).sum(1), ids.to(device), mask.to(device)).cpu()
