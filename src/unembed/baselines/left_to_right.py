"""A left-to-right inverter p(x | e) and its corrector p(x | e, x̂, ê): a prefix language model.

What Vec2Text (Morris et al., 2023, arXiv 2310.06816, sections 3 and 4) asks of T5, at the size of
our denoiser: vectors become pseudo-tokens, a causal transformer writes the text behind them. The
pseudo-tokens and the hypothesis see each other, as in T5's encoder; text sees what is before it.

Letters: B batch, K beams, L length, P prefix, D embedding size, H hidden size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unembed.tokenizer import TextTokenizer


@dataclass(frozen=True)
class PrefixSizes:
    """Sizes that fix the shapes of the weights.

    Attributes:
        vocab_size: Tokens V.
        embedding_dim: Size D of the vectors.
        length: Positions L of a text, its end token included.
        hidden: Hidden size H.
        layers: Blocks.
        heads: Attention heads.
        feed_forward: Inner width of each block's feed-forward layer.
        slots: Pseudo-tokens that each vector becomes.
        corrector: Whether it is also told a hypothesis x̂ and its embedding ê.
    """

    vocab_size: int
    embedding_dim: int
    length: int = 32
    hidden: int = 384
    layers: int = 4
    heads: int = 6
    feed_forward: int = 1536
    slots: int = 8
    corrector: bool = False


@dataclass
class Cache:
    """Keys and values of a block, so that each token is computed once.

    Attributes:
        prefix: Of the prefix, two of [B, heads, P, H/heads], shared by the beams of a vector.
        text: Of the text so far, two of [B, K, heads, n, H/heads].
    """

    prefix: tuple[Tensor, Tensor]
    text: tuple[Tensor, Tensor]


class PrefixBlock(nn.Module):
    """Pre-norm attention and feed-forward."""

    def __init__(self, sizes: PrefixSizes) -> None:
        super().__init__()
        hidden = sizes.hidden
        self.heads = sizes.heads
        self.norm_attention = nn.LayerNorm(hidden)
        self.qkv = nn.Linear(hidden, 3 * hidden)
        self.attention_out = nn.Linear(hidden, hidden)
        self.norm_feed_forward = nn.LayerNorm(hidden)
        self.up = nn.Linear(hidden, sizes.feed_forward)
        self.down = nn.Linear(sizes.feed_forward, hidden)

    def forward(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Run x [B, T, H] with an additive mask [T, T]; also its keys and values."""
        batch, length, hidden = x.shape
        qkv = self.qkv(self.norm_attention(x)).view(batch, length, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [B, heads, T, H/heads]
        # Two products: the fused kernel is slow backwards in bfloat16 on a CPU (see `denoiser`)
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)  # [B, heads, T, T]
        if mask is not None:
            scores = scores + mask
        h = (scores.softmax(dim=-1) @ v).transpose(1, 2).reshape(batch, length, hidden)
        return self._rest(x, h), (k, v)

    def step(self, x: Tensor, cache: Cache) -> Tensor:
        """Run the next token of each beam, x [B, K, H], and add it to the cache."""
        batch, beams, _ = x.shape
        qkv = self.qkv(self.norm_attention(x)).view(batch, beams, 3, self.heads, -1)
        q, k, v = qkv.unbind(2)  # each [B, K, heads, H/heads]
        cache.text = (
            torch.cat([cache.text[0], k[:, :, :, None]], dim=3),
            torch.cat([cache.text[1], v[:, :, :, None]], dim=3),
        )
        q = q * q.shape[-1] ** -0.5
        before = torch.einsum("bkhd,bhpd->bkhp", q, cache.prefix[0])
        scores = torch.cat([before, torch.einsum("bkhd,bkhnd->bkhn", q, cache.text[0])], dim=-1)
        p, n = scores.softmax(dim=-1).tensor_split([before.shape[-1]], dim=-1)
        h = torch.einsum("bkhp,bhpd->bkhd", p, cache.prefix[1])
        h = h + torch.einsum("bkhn,bkhnd->bkhd", n, cache.text[1])
        return self._rest(x, h.flatten(2))

    def _rest(self, x: Tensor, h: Tensor) -> Tensor:
        x = x + self.attention_out(h)
        hidden: Tensor = self.down(F.gelu(self.up(self.norm_feed_forward(x))))
        return x + hidden


class LeftToRight(nn.Module):
    """Vector, or vector and hypothesis → logits of the next token."""

    def __init__(self, sizes: PrefixSizes) -> None:
        super().__init__()
        self.sizes = sizes
        hidden, width = sizes.hidden, sizes.embedding_dim
        self.token_table = nn.Embedding(sizes.vocab_size, hidden)  # tied to the output
        self.positions = nn.Parameter(torch.zeros(sizes.length, hidden))
        self.start = nn.Parameter(torch.zeros(hidden))  # stands before the first token
        # Of e, and of a corrector of ê and e - ê
        self.vector_mlps = nn.ModuleList(
            nn.Sequential(
                nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, sizes.slots * hidden)
            )
            for _ in range(3 if sizes.corrector else 1)
        )
        self.blocks = nn.ModuleList(PrefixBlock(sizes) for _ in range(sizes.layers))
        self.norm_out = nn.LayerNorm(hidden)
        # The denoiser's direct bag-of-words path, without which either learns far more slowly
        self.embedding_shift = nn.Linear(width, hidden, bias=False)
        self.output_bias = nn.Parameter(torch.zeros(sizes.vocab_size))
        if sizes.corrector:
            self.hypothesis_positions = nn.Parameter(torch.zeros(sizes.length, hidden))
        self._initialise()

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.normal_(self.token_table.weight, std=0.02)
        nn.init.normal_(self.positions, std=0.02)
        nn.init.normal_(self.start, std=0.02)
        if self.sizes.corrector:
            nn.init.normal_(self.hypothesis_positions, std=0.02)
        nn.init.zeros_(self.embedding_shift.weight)
        # Branches start small, so that the network starts near the identity
        for name, parameter in self.named_parameters():
            if name.endswith(("attention_out.weight", "down.weight")):
                nn.init.normal_(parameter, std=0.02 / (2 * len(self.blocks)) ** 0.5)

    def prefix(self, embedding: Tensor, hypothesis: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Make what stands before the text, and the shift of its output.

        Args:
            embedding: Unit vectors e [B, D]; of a corrector [B, 2 D], e beside ê.
            hypothesis: Tokens of x̂ [B, N], padded; of a corrector only.

        Returns:
            The prefix [B, P, H] and the shift [B, H].
        """
        width, slots = self.sizes.embedding_dim, self.sizes.slots
        scaled = embedding.to(self.start.dtype) * width**0.5  # components at variance one
        e = scaled[:, :width]
        vectors = [e] if hypothesis is None else [e, scaled[:, width:], e - scaled[:, width:]]
        parts = [
            mlp(vector).view(len(e), slots, -1)
            for mlp, vector in zip(self.vector_mlps, vectors, strict=True)
        ]
        if hypothesis is not None:
            places = self.hypothesis_positions[: hypothesis.shape[1]]
            parts.append(self.token_table(hypothesis) + places)
        return torch.cat(parts, dim=1), self.embedding_shift(e)

    def hidden_states(self, tokens: Tensor, embedding: Tensor, t: Tensor | None = None) -> Tensor:
        """Compute what the output table is multiplied with to predict each token of a text.

        Args:
            tokens: Ids [B, L]; of a corrector [B, 2 L], those of x̂ before those of x.
            embedding: As in `prefix`.
            t: Not used; the trainer's loss hands one to a denoiser.

        Returns:
            [B, L, H]: at place l what the tokens before l say.
        """
        length = self.sizes.length
        hypothesis = tokens[:, :length] if self.sizes.corrector else None
        prefix, shift = self.prefix(embedding, hypothesis)
        text = self.token_table(tokens[:, -length:-1])  # [B, L - 1, H]
        start = self.start.expand(len(text), 1, -1)
        x = torch.cat([prefix, torch.cat([start, text], dim=1) + self.positions], dim=1)
        mask = _prefix_mask(prefix.shape[1], x.shape[1]).to(x)
        for block in self.blocks:
            x, _ = block(x, mask)
        h: Tensor = self.norm_out(x[:, -length:]) + shift[:, None]
        return h

    def read(
        self, embedding: Tensor, hypothesis: Tensor | None, beams: int
    ) -> tuple[list[Cache], Tensor]:
        """Read the prefix: a cache for each block, and the shift [B, 1, H]."""
        x, shift = self.prefix(embedding, hypothesis)
        caches = []
        for block in self.blocks:
            x, pair = block(x, None)
            batch, heads, _, width = pair[0].shape
            none = pair[0].new_empty(batch, beams, heads, 0, width)
            caches.append(Cache(pair, (none, none)))
        return caches, shift[:, None]

    def next_logits(
        self, tokens: Tensor | None, place: int, caches: list[Cache], shift: Tensor
    ) -> Tensor:
        """Predict the token at a place from those before it, [B, K, V] in float32.

        Args:
            tokens: Token before the place [B, K]; None at the first.
            place: From 0.
            caches: Of each block; the token is added.
            shift: Of `read`.
        """
        beams = caches[0].text[0].shape[1]
        x = self.start.expand(len(shift), beams, -1) if tokens is None else self.token_table(tokens)
        x = x + self.positions[place]
        for block, cache in zip(self.blocks, caches, strict=True):
            assert isinstance(block, PrefixBlock)
            x = block.step(x, cache)
        h = self.norm_out(x) + shift
        return F.linear(h, self.token_table.weight, self.output_bias).float()


def _prefix_mask(prefix: int, total: int) -> Tensor:
    """Additive mask [T, T]: the prefix is seen by all, a text by what follows."""
    places = torch.arange(total)
    visible = (places[None] < prefix) | (places[None] <= places[:, None])
    return torch.zeros(total, total).masked_fill(~visible, -torch.inf)


@torch.no_grad()
def write_texts(
    network: LeftToRight,
    ids: TextTokenizer,
    embedding: Tensor,
    hypothesis: Tensor | None = None,
    beams: int = 1,
) -> tuple[Tensor, Tensor]:
    """Write the most probable texts by beam search; greedily with one beam.

    Args:
        network: Inverter, or corrector.
        ids: Its tokens.
        embedding: As in `LeftToRight.prefix`.
        hypothesis: As in `LeftToRight.prefix`, [B, L].
        beams: K.

    Returns:
        Target sequences [B, K, L] (text, end token, padding), best first by log-probability a
        token, and these [B, K].
    """
    batch, length = len(embedding), network.sizes.length
    caches, shift = network.read(embedding, hypothesis, beams)
    tokens = torch.full((batch, beams, length), ids.pad_id)
    scores = torch.zeros(batch, beams)
    scores[:, 1:] = -torch.inf  # the beams differ from the first token on
    ended = torch.zeros(batch, beams, dtype=torch.bool)
    last: Tensor | None = None
    for place in range(length):
        logits = network.next_logits(last, place, caches, shift)
        logits[..., [ids.pad_id, ids.mask_id]] = -torch.inf
        if place == 0:  # no text is empty
            logits[..., ids.end_id] = -torch.inf
        log_p = logits.log_softmax(dim=-1)
        if place == length - 1:
            log_p[..., : ids.end_id] = log_p[..., ids.end_id + 1 :] = -torch.inf
        log_p[ended] = -torch.inf
        log_p[..., ids.pad_id].masked_fill_(ended, 0.0)
        # The best continuations of all beams of a vector
        totals = (scores[..., None] + log_p).flatten(1)  # [B, K V]
        scores, picks = totals.topk(beams)
        origin, last = picks // log_p.shape[-1], picks % log_p.shape[-1]
        rows = torch.arange(batch)[:, None]
        tokens = tokens[rows, origin]
        tokens[:, :, place] = last
        ended = ended[rows, origin] | (last == ids.end_id)
        if ended.all():
            break
        if beams > 1:
            for cache in caches:
                cache.text = (cache.text[0][rows, origin], cache.text[1][rows, origin])
    means = scores / (tokens != ids.pad_id).sum(dim=-1)
    means, order = means.sort(dim=1, descending=True)
    return tokens.gather(1, order[..., None].expand_as(tokens)), means
