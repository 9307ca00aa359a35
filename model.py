"""A small GPT, the log-probabilities that it gives to a text, and its sampler.

Shapes: B sequences of a batch, N of all batches, X prompts, M response tokens of a batch, T tokens,
P tokens of the longest prompt, V vocabulary, H heads, D width of a head, W width of the model.
A row of ids is prompt, response, filler. A mask (B, T) marks the response tokens.
"""
import math
from dataclasses import dataclass
from typing import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


# ---------------------------------------------------------------------------------------- the GPT
@dataclass
class GPTConfig:
    vocab_size: int    # V
    context: int       # the longest sequence, tokens
    layers: int
    heads: int
    width: int         # W; each head has D = W / heads


def rotary_table(positions: int, size: int) -> Tensor:
    """Cosines and signed sines of the rotary embedding: (2, positions, 1, size), Su et al. 2021.

    Frequencies fall from 1 radian per position towards 1/1000 (usually 1/10,000; our texts are
    short). If `size` is odd, the last coordinate is not rotated.
    """
    half = size // 2
    frequency = 1000. ** (-torch.arange(half) / half)
    angle = torch.arange(positions)[:, None, None] * frequency               # (positions, 1, half)
    cos = torch.cat([angle.cos(), angle.cos()], -1)
    sin = torch.cat([-angle.sin(), angle.sin()], -1)
    odd = (0, size % 2)
    return torch.stack([F.pad(cos, odd, value=1.), F.pad(sin, odd)])


def apply_rotary(x: Tensor, table: Tensor) -> Tensor:
    """Rotate each pair of coordinates (i, i + D / 2) by the angle of its position.

    x (B, T, H, D), table (2, T, 1, D) -> (B, T, H, D). The product of a query rotated at position s
    and a key rotated at position t depends only on s - t.
    """
    cos, sin = table
    half = x.shape[-1] // 2
    first, second, odd = x.split([half, half, x.shape[-1] - 2 * half], -1)
    return x * cos + torch.cat([second, first, odd], -1) * sin


def causal_mask(x: Tensor, start: int) -> Tensor:
    """Causal attention mask of the tokens x (B, T, W) at positions start..start+T-1.

    -> (T, start + T): -inf where a key comes after its query, else 0.
    """
    T = x.shape[1]
    return torch.full((T, start + T), -math.inf, dtype=x.dtype, device=x.device).triu(start + 1)


class Attention(nn.Module):
    """Causal multi-head self-attention with rotary positions and an optional key/value cache."""
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.out = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor, rotary: Tensor, cache: Tensor | None, start: int) -> Tensor:
        """x (B, T, W) at positions start..start+T-1, rotary (2, T, 1, D) -> (B, T, W).

        A cache (2, B, H, positions, D) holds the keys and values before `start`; those of x are
        added to it.
        """
        B, T, W = x.shape
        H, D = self.heads, W // self.heads
        qk, v = self.qkv(x).view(B, T, 3 * H, D).split([2 * H, H], 2)
        q, k = apply_rotary(qk, rotary).chunk(2, 2)                          # (B, T, H, D) each
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))                     # (B, H, T, D) each
        if cache is not None:
            cache[0, :, :, start:start + T] = k
            cache[1, :, :, start:start + T] = v
            k, v = cache[:, :, :, :start + T]                                # (B, H, start+T, D)
        scores = (q * D ** -.5) @ k.transpose(-1, -2)                        # (B, H, T, start+T)
        y = torch.softmax(scores + causal_mask(x, start), -1) @ v            # (B, H, T, D)
        return self.out(y.transpose(1, 2).reshape(B, T, W))


class Block(nn.Module):
    """Pre-norm Transformer block. No dropout anywhere: it would add noise to log-ratios."""
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.norm_1 = nn.LayerNorm(config.width)
        self.attention = Attention(config)
        self.norm_2 = nn.LayerNorm(config.width)
        self.mlp = nn.Sequential(nn.Linear(config.width, 4 * config.width), nn.GELU(),
                                 nn.Linear(4 * config.width, config.width))

    def forward(self, x: Tensor, rotary: Tensor, cache: Tensor | None, start: int) -> Tensor:
        x = x + self.attention(self.norm_1(x), rotary, cache, start)
        return x + self.mlp(self.norm_2(x))


class GPT(nn.Module):
    """model(ids (B, T)) -> logits (B, T, V) at every position; those at t predict token t + 1."""
    def __init__(self, config: GPTConfig, generator: torch.Generator | None = None):
        super().__init__()
        self.config = config
        self.token = nn.Embedding(config.vocab_size, config.width)    # tied: the output matrix too
        table = rotary_table(config.context, config.width // config.heads)
        self.register_buffer("rotary", table, persistent=False)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        self.initialise(generator)

    def initialise(self, generator: torch.Generator | None) -> None:
        """GPT-2's initialisation, but the standard deviation of token embeddings is .2, not .02.

        SFT has no reason to separate words of one role, such as "superb" and "dull". If they start
        at the same place they stay there, and later training can hardly tell them apart.
        """
        for name, p in self.named_parameters():
            if p is self.token.weight:
                nn.init.normal_(p, std=.2, generator=generator)
            elif name.endswith(("out.weight", "mlp.2.weight")):              # added to the residual
                nn.init.normal_(p, std=.02 * (2 * self.config.layers) ** -.5, generator=generator)
            elif p.dim() == 2:
                nn.init.normal_(p, std=.02, generator=generator)
            elif name.endswith("bias"):
                nn.init.zeros_(p)                                            # norm weights stay 1

    def hidden(self, ids: Tensor, kv_caches: list[Tensor] | None = None, start: int = 0) -> Tensor:
        """Hidden states after the last norm: ids (B, T) at positions start.. -> (B, T, W).

        `kv_caches` (from `new_caches`) hold the keys and values of earlier positions.
        """
        end = start + ids.shape[1]
        assert end <= self.config.context, \
            f"{end} tokens do not fit into a context of {self.config.context}"
        x = self.token(ids)
        for i, block in enumerate(self.blocks):
            x = block(x, self.rotary[:, start:end], kv_caches[i] if kv_caches else None, start)
        return self.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits of the next token from hidden states: (..., W) -> (..., V)."""
        return F.linear(hidden, self.token.weight)

    def forward(self, ids: Tensor) -> Tensor:
        return self.logits(self.hidden(ids))

    def new_caches(self, batch: int, positions: int) -> list[Tensor]:
        """Empty key/value caches, one for each block: (2, batch, H, positions, D)."""
        c = self.config
        shape = 2, batch, c.heads, positions, c.width // c.heads
        return [self.token.weight.new_empty(shape) for _ in self.blocks]


# --------------------------------------------------------------------------- training any model
def cpu_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the model's parameters on the CPU."""
    return {name: p.detach().cpu().clone() for name, p in model.state_dict().items()}


def lr_schedule(optimizer, steps: int):
    """Linear warm-up over the first tenth of the steps, then linear decay to 0.

    The paper warms up over 150 steps and mentions no decay (App. B). Returns a torch scheduler;
    call step() `steps` times.
    """
    def factor(step: int) -> float:
        return min((step + 1) / (.1 * steps), (steps - step) / (.9 * steps), 1.)

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


# ------------------------------------------------------------------------------ log-probabilities
def upcast_half(logits: Tensor) -> Tensor:
    """Half precision as float32, other types unchanged.

    A difference of log-probabilities in half precision is mostly rounding error.
    """
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


def log_softmax(logits: Tensor) -> Tensor:
    """Log-softmax over the vocabulary, in float32 at least: (..., V) -> (..., V)."""
    return F.log_softmax(upcast_half(logits), dim=-1)


def token_logp(logits: Tensor, ids: Tensor) -> Tensor:
    """log pi(ids[t] | ids[<t]) for t = 1..T-1, nats: logits (B, T, V), ids (B, T) -> (B, T-1).

    The off-by-one of all language models: the logits at t-1 predict the token at t. So entry t-1 of
    the result belongs to ids[t], the first token has no probability, and the last logits predict
    nothing. `response_token_logp` puts the values back at t. The same shift: `predicts_response`,
    `sequence_logp`, `response_logits`, `dpo.dpo_gradient_logits`, `ppo.states_before_tokens`.
    """
    return log_softmax(logits[:, :-1]).gather(-1, ids[:, 1:, None]).squeeze(-1)


def predicts_response(mask: Tensor) -> Tensor:
    """Where the logits predict a response token, one position before it: mask (B, T) -> (B, T)."""
    return F.pad(mask[:, 1:].bool(), (0, 1))


def sequence_logp(logits: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """log pi(y | x), nats: logits (B, T, V), ids (B, T), mask (B, T) of response tokens -> (B,).

    A sum, not a mean: pi(y | x) is the product of its tokens' probabilities. Entries outside the
    mask are never read. This is the plain form; training uses `response_token_logp`.
    """
    mask = mask.bool()
    logits = logits.masked_fill(~predicts_response(mask)[..., None], 0.)  # no NaN in the gradient
    logp = token_logp(logits, ids.masked_fill(~mask, 0))                     # (B, T-1)
    return logp.masked_fill(~mask[:, 1:], 0.).sum(1)


def response_logits(model: GPT, ids: Tensor, mask: Tensor) -> Tensor:
    """The logits that predict the M response tokens, row after row: (B, T), (B, T) -> (M, V).

    The output matrix is a third of a small model's arithmetic; prompts and filler skip it here.
    """
    hidden = model.hidden(ids[:, :-1])                    # position t-1 predicts token t
    return model.logits(hidden[mask[:, 1:]])


def scatter_to_tokens(values: Tensor, mask: Tensor) -> Tensor:
    """Values (M,) of response tokens at their positions, 0 elsewhere: mask (B, T) -> (B, T)."""
    return values.new_zeros(mask.shape).masked_scatter(mask, values)


def response_token_logp(model: GPT, ids: Tensor, mask: Tensor) -> Tensor:
    """log pi of each response token, nats, 0 elsewhere: ids (B, T), bool mask (B, T) -> (B, T).

    Its sum over T is `sequence_logp(model(ids), ids, mask)`, at a lower cost. The mask must be
    False at position 0: the first token has no probability.
    """
    logits = upcast_half(response_logits(model, ids, mask))                  # (M, V)
    logp = -F.cross_entropy(logits, ids[mask], reduction="none")             # (M,)
    return scatter_to_tokens(logp, mask)


def token_kl(logits: Tensor, ref_logits: Tensor) -> Tensor:
    """KL(pi || pi_ref) of the next token over the whole vocabulary, nats: (..., V) -> (...)."""
    logp = log_softmax(logits)
    ref_logp = log_softmax(ref_logits)
    return (logp.exp() * (logp - ref_logp)).sum(-1)


def sequence_kl(logits: Tensor, ref_logits: Tensor, mask: Tensor) -> Tensor:
    """Sum over a response of the full-vocabulary KL at each step (footnote 3), nats.

    logits (B, T, V), ref_logits (B, T, V), mask (B, T) -> (B,). Its mean over y ~ pi is
    KL(pi || pi_ref) = E[log pi(y|x) - log pi_ref(y|x)]. The sampled log-ratio has the same mean,
    but more variance: here each step takes the expectation over its token (Rao-Blackwell).
    """
    ignored = ~predicts_response(mask)[..., None]
    kl = token_kl(logits.masked_fill(ignored, 0.), ref_logits.masked_fill(ignored, 0.))
    return kl.sum(1)                                                         # 0 where ignored


def response_kl(model: GPT, ref: GPT, ids: Tensor, mask: Tensor) -> Tensor:
    """`sequence_kl` of two models, as the evaluation measures it: (B, T), (B, T) -> (B,)."""
    kl = token_kl(response_logits(model, ids, mask), response_logits(ref, ids, mask))        # (M,)
    return scatter_to_tokens(kl, mask).sum(1)


# ------------------------------------------------------------------------------------ the sampler
def sample_token(logits: Tensor, temperature: float, u: Tensor) -> Tensor:
    """Sample one token per row by the inverse CDF: logits (B, V), u (B,) -> (B,).

    `u` is uniform in [0, 1): given from outside, so that a row's sample does not depend on which
    other rows have already ended. Temperature 0 is argmax.
    """
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float()
    if temperature != 1:                                  # saves a pass over (B, V) at the usual 1
        logits = logits / temperature
    cdf = torch.softmax(logits, -1).cumsum(-1)            # its last entry is only nearly 1
    token = torch.searchsorted(cdf, (u * cdf[:, -1])[:, None], right=True).squeeze(1)
    return token.clamp(max=logits.shape[1] - 1)


def prompts_with_filler(prompts: Tensor, prompt_lengths: Tensor, width: int, end: int) -> Tensor:
    """Rows that hold their prompt, then `end`: prompts (B, P), lengths (B,) -> ids (B, width)."""
    ids = F.pad(prompts, (0, width - prompts.shape[1]), value=end)           # also cuts P to width
    is_prompt = torch.arange(width, device=ids.device) < prompt_lengths[:, None]
    return torch.where(is_prompt, ids, end)


@torch.no_grad()
def sample(model: GPT, prompts: Tensor, prompt_lengths: Tensor, max_tokens: int | Tensor, end: int,
           temperature: float = 1., generator: torch.Generator | None = None,
           logp_out: Tensor | None = None) -> Tensor:
    """Sample a response to each prompt: prompts (B, P), prompt_lengths (B,) -> ids (B, T).

    Row b holds its prompt from position 0, its response right after it, then the end token `end` as
    filler. A response has at most max_tokens (a number or (B,), 1 or more), the end token included.
    All rows are at the same position; a row whose prompt lasts longer reads its next token from the
    prompt, so nothing is padded on the left. T is the most of prompt + max_tokens, or less if all
    rows end before. `logp_out`, zeros (B, >= T), gets log pi of the sampled tokens, temperature 1.
    """
    B, device = len(prompts), prompts.device
    stop = prompt_lengths + max_tokens                                       # (B,)
    shortest, T = int(prompt_lengths.min()), int(stop.max())
    ids = prompts_with_filler(prompts, prompt_lengths, T, end)
    rows = torch.arange(B, device=device)                                    # rows still computed
    alive = torch.ones(B, dtype=torch.bool, device=device)                   # not yet ended
    kv_caches = model.new_caches(B, T)
    x = ids[:, :shortest]                                                    # the next to read
    for t in range(shortest, T):
        logits = model.logits(model.hidden(x, kv_caches, t - x.shape[1])[:, -1])    # (rows, V)
        u = torch.rand(B, generator=generator, device=device)[rows]
        token = sample_token(logits, temperature, u)
        sampled = alive & (t >= prompt_lengths[rows])
        if logp_out is not None:
            logp = log_softmax(logits).gather(1, token[:, None]).squeeze(1)
            logp_out[rows, t] = logp.masked_fill(~sampled, 0.)
        token = torch.where(sampled, token, ids[rows, t])                    # else prompt or filler
        ids[rows, t] = token
        alive &= ~(sampled & (token == end)) & (t + 1 < stop[rows])
        x = token[:, None]
        if t % 4 > 0:    # nonzero() waits for the device, so ended rows are dropped every 4 steps
            continue
        keep = alive.nonzero().squeeze(1)
        if len(keep) == 0:
            return ids[:, :t + 1]
        if len(keep) < .8 * len(rows):                                       # drop the ended rows
            rows, x, alive = (y[keep] for y in (rows, x, alive))
            kv_caches = [cache[:, keep] for cache in kv_caches]
    return ids


def response_mask(ids: Tensor, prompt_lengths: Tensor, max_tokens: int, end: int) -> Tensor:
    """Which ids are response tokens, the first end token included: ids (B, T) -> bool (B, T)."""
    columns = torch.arange(ids.shape[1], device=ids.device)
    begin = prompt_lengths[:, None]
    response = (columns >= begin) & (columns < begin + max_tokens)
    is_end = ((ids == end) & response).int()
    ends_before = is_end.cumsum(1) - is_end
    return response & (ends_before == 0)


def last_response_token(mask: Tensor) -> Tensor:
    """The position of the last response token: mask (B, T) -> (B,)."""
    return mask.shape[1] - 1 - mask.int().flip(1).argmax(1)


def generate(model: GPT, prompts: tuple[Tensor, Tensor], count: int, max_tokens: int, end: int,
             generator: torch.Generator, temperature: float = 1.,
             batch: int = 2048) -> tuple[Tensor, Tensor]:
    """Sample `count` responses to each of X prompts. Responses to one prompt are consecutive rows.

    prompts is ids (X, P) and lengths (X,) -> ids (X * count, P + max_tokens) and their mask.
    """
    ids, lengths = (p.repeat_interleave(count, 0) for p in prompts)
    width = prompts[0].shape[1] + max_tokens
    parts = []
    for part_ids, part_lengths in zip(ids.split(batch), lengths.split(batch)):
        part = sample(model, part_ids, part_lengths, max_tokens, end, temperature, generator)
        parts.append(F.pad(part, (0, width - part.shape[1]), value=end))
    ids = torch.cat(parts)
    return ids, response_mask(ids, lengths, max_tokens, end)


# ----------------------------------------------------------------------------- scoring in batches
def trimmed_width(mask: Tensor) -> int:
    """One past the last response token of all rows; later columns are filler. mask (B, T)."""
    return int(mask.any(0).nonzero().max()) + 1


@torch.no_grad()
def map_batches(function: Callable[[Tensor, Tensor], Tensor], ids: Tensor, mask: Tensor,
                batch: int = 64) -> Tensor:
    """function(ids, mask) of many rows, sorted by response length: (N, T), (N, T) -> (N, ...).

    Each batch is cut to its longest row. Where the function returns one value per token,
    (B, T, ...), the columns that were cut off are 0.
    """
    parts = []
    order = mask.sum(1).argsort(stable=True)
    for rows in order.split(batch):
        width = trimmed_width(mask[rows])
        part = function(ids[rows, :width], mask[rows, :width])
        if part.dim() > 1:
            filler = part.new_zeros(len(rows), mask.shape[1] - width, *part.shape[2:])
            part = torch.cat([part, filler], 1)
        parts.append(part)
    return torch.cat(parts)[order.argsort()]


def batched_sequence_logp(model: GPT, ids: Tensor, mask: Tensor, device: str) -> Tensor:
    """log pi(y|x) of many responses, nats, without gradient: (N, T), (N, T) -> (N,) on the CPU."""
    def logp(ids: Tensor, mask: Tensor) -> Tensor:
        return response_token_logp(model, ids, mask).sum(1)

    return map_batches(logp, ids.to(device), mask.to(device)).cpu()
