"""The denoiser: a bidirectional transformer that predicts masked tokens from an embedding.

Read it top to bottom: sizes, attention, block, network. The conditioning follows DiT (Peebles and
Xie, 2023, arXiv 2212.09748, section 3.2, "adaLN-Zero"): the embedding and the timestep are added
into one vector, and each block derives from it a shift, a scale and a gate for its two branches.
The maps to those are zero at the start, so every block starts as the identity.

Letters: B batch, L length, D embedding size, H hidden size, V vocabulary, M positions to predict.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unembed.errors import CheckpointError

# The direct path in closed form: ridges, pairs kept apart, lengths of the step
_RIDGE_TABLE, _RIDGE_PAIRS, _MOST_APART = 0.1, 0.1, 128
_LENGTHS = (0.0, 0.125, 0.1768, 0.25, 0.3536, 0.5, 0.7071, 1.0)
_TIMESTEP_FEATURES = 256
_STRONGEST = 10.0  # guidance


@dataclass(frozen=True)
class DenoiserSizes:
    """Sizes that fix the shapes of the weights; the defaults are the reference size.

    That is 88 M parameters beside the vocabulary: the 78 M of arXiv 2602.11047, which has no
    gates, and the gates.

    Attributes:
        vocab_size: Tokens V, the mask token included.
        embedding_dim: Size D of the embeddings it is conditioned on.
        length: Positions L.
        hidden: Hidden size H.
        layers: Blocks.
        heads: Attention heads; must divide ``hidden``.
        feed_forward: Inner width of each block's feed-forward layer.
        feedback: Whether it is also told the embedding of a hypothesis.
        guidance: Strength w of the guidance that `Denoiser.output_states` adds.
        prefix: Positions at the beginning that it was also trained on alone, and all L on texts
            that go on behind them only; 0: always on all.
    """

    vocab_size: int
    embedding_dim: int
    length: int = 32
    hidden: int = 768
    layers: int = 8
    heads: int = 12
    feed_forward: int = 3072
    feedback: bool = False
    guidance: float = 0.0
    prefix: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {name: size for name, size in asdict(self).items() if size}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> DenoiserSizes:
        """The sizes that ``to_dict`` wrote.

        Raises:
            CheckpointError: A key is missing or unknown, or a value is not a positive integer.
        """
        try:
            sizes = cls(**data)
        except TypeError as error:
            raise CheckpointError(
                "the sizes of a denoiser",
                str(error),
                "Use the config.json saved beside the weights",
            ) from error
        options = ("feedback", "guidance", "prefix")
        numbers = {k: v for k, v in asdict(sizes).items() if k not in options}
        bad = {k: v for k, v in numbers.items() if type(v) is not int or v < 1}
        if not isinstance(data.get("feedback", False), bool):
            bad["feedback"] = data["feedback"]
        strength = data.get("guidance", 0.0)
        if type(strength) not in (int, float) or not 0.0 <= strength <= _STRONGEST:
            bad["guidance"] = strength
        if type(sizes.prefix) is not int or (not bad and not 0 <= sizes.prefix < sizes.length):
            bad["prefix"] = sizes.prefix
        if bad or sizes.hidden % sizes.heads:
            raise CheckpointError(
                "positive sizes, with heads dividing hidden",
                str(bad or data),
                "Correct config.json",
            )
        return sizes


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Scale and shift x [B, L, H]: shift and scale [B, 1, H]."""
    return torch.addcmul(shift, x, 1 + scale)


def flat_index(positions: Tensor | None) -> Tensor | None:
    """Flat indices [M] of positions, which may be boolean [B, L]; None, all, stays None."""
    if positions is None or positions.dtype != torch.bool:
        return positions
    return positions.flatten().nonzero()[:, 0]


def timestep_features(t: Tensor) -> Tensor:
    """Sinusoids of t [B] in [0, 1], geometric frequencies up to 1000 → [B, 256]."""
    half = _TIMESTEP_FEATURES // 2
    exponents = torch.arange(half, device=t.device, dtype=torch.float32) / half
    angles = 1000.0 * t.float()[:, None] * torch.exp(-math.log(10_000.0) * exponents)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention over q, k, v [B, heads, L, H/heads], by whichever kernel is quicker.

    That is the fused one, except for the backward pass of bfloat16 on a CPU, where it takes eight
    times as long as two batched products (docs/results.md).
    """
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.requires_grad:
        scores: Tensor = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)  # [B, heads, L, L]
        return torch.matmul(scores.softmax(dim=-1), v)
    return F.scaled_dot_product_attention(q, k, v)


class Block(nn.Module):
    """Pre-norm attention and feed-forward, each shifted, scaled and gated by the condition."""

    def __init__(self, sizes: DenoiserSizes) -> None:
        super().__init__()
        hidden = sizes.hidden
        self.heads = sizes.heads
        self.norm_attention = nn.LayerNorm(hidden, elementwise_affine=False)
        self.qkv = nn.Linear(hidden, 3 * hidden)
        self.attention_out = nn.Linear(hidden, hidden)
        self.norm_feed_forward = nn.LayerNorm(hidden, elementwise_affine=False)
        self.up = nn.Linear(hidden, sizes.feed_forward)
        self.down = nn.Linear(sizes.feed_forward, hidden)
        self.modulation = nn.Linear(hidden, 6 * hidden)

    def forward(self, x: Tensor, condition: Tensor, index: Tensor | None = None) -> Tensor:
        """Normalise and project x [B, L, H] by condition [B, H]; at flat indices [M] to [M, H]."""
        batch, length, hidden = x.shape
        parts = self.modulation(condition)[:, None].chunk(6, dim=-1)  # 6 of [B, 1, H]
        shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = parts

        h = modulate(self.norm_attention(x), shift_a, scale_a)  # [B, L, H]
        qkv = self.qkv(h).view(batch, length, 3, self.heads, hidden // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [B, heads, L, H/heads]
        h = attention(q, k, v).transpose(1, 2).reshape(batch, length, hidden)
        if index is not None:  # beyond attention no position needs another
            x, h = x.flatten(0, 1)[index], h.flatten(0, 1)[index]  # [M, H]
            of_rows = (p[:, 0][index // length] for p in (gate_a, shift_f, scale_f, gate_f))
            gate_a, shift_f, scale_f, gate_f = of_rows
        x = torch.addcmul(x, gate_a, self.attention_out(h))

        h = modulate(self.norm_feed_forward(x), shift_f, scale_f)
        h = self.down(F.gelu(self.up(h)))
        return torch.addcmul(x, gate_f, h)  # [B, L, H] or [M, H]


class Denoiser(nn.Module):
    """Masked tokens + embedding + timestep → logits at masked positions."""

    def __init__(self, sizes: DenoiserSizes) -> None:
        super().__init__()
        self.sizes = sizes
        hidden = sizes.hidden
        table = torch.empty(sizes.vocab_size, hidden)  # tied to the output; `_initialise` fills it
        self.token_table = nn.Embedding(sizes.vocab_size, hidden, _weight=table)
        self.positions = nn.Parameter(torch.zeros(sizes.length, hidden))
        self.embedding_mlp = nn.Sequential(
            nn.Linear(sizes.embedding_dim, hidden), nn.GELU(), nn.Linear(hidden, hidden)
        )
        self.timestep_mlp = nn.Sequential(
            nn.Linear(_TIMESTEP_FEATURES, hidden), nn.SiLU(), nn.Linear(hidden, hidden)
        )
        self.blocks = nn.ModuleList(Block(sizes) for _ in range(sizes.layers))
        self.norm_out = nn.LayerNorm(hidden, elementwise_affine=False)
        self.modulation_out = nn.Linear(hidden, 2 * hidden)
        # A direct bag-of-words path: without it learning is far slower.
        self.embedding_shift = nn.Linear(sizes.embedding_dim, hidden, bias=False)
        self.output_bias = nn.Parameter(torch.zeros(sizes.vocab_size))
        if sizes.feedback:  # to the condition, and to the output as `embedding_shift`
            self.feedback = nn.Linear(2 * sizes.embedding_dim, 2 * hidden, bias=False)
        if sizes.guidance:  # [h, e] → h without e; fitted after training
            self.unconditional = nn.Linear(hidden + sizes.embedding_dim, hidden)
        self._initialise()

    def _initialise(self) -> None:
        """Initialise all weights, in one place."""
        if self.positions.is_meta:  # no values; and there `normal_` loads torch's compiler, seconds
            return
        # Linear layers: Xavier; biases: zero.
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        # Tables: small, so that the tied output starts near uniform.
        nn.init.normal_(self.token_table.weight, std=0.02)
        nn.init.normal_(self.positions, std=0.02)
        # adaLN-Zero: every block starts as the identity, and the shift from the embedding at zero;
        # feedback too, so that weights trained without it predict as before.
        for name, parameter in self.named_parameters():
            if "modulation" in name or name in ("embedding_shift.weight", "feedback.weight"):
                nn.init.zeros_(parameter)

    def hidden_states(
        self, tokens: Tensor, embedding: Tensor, t: Tensor, positions: Tensor | None = None
    ) -> Tensor:
        """Compute what the output table is multiplied with.

        Args:
            tokens: Ids [B, L], the mask token where masked.
            embedding: Unit vectors e [B, D]; with feedback also [B, 2 D], e beside the embedding ê
                of a hypothesis, whose tokens stand where none is masked; zeros where there is none.
            t: Timesteps [B] in [0, 1]; 1 is all masked.
            positions: Positions to predict, as in `forward`.

        Returns:
            [B, L, H], or [M, H].
        """
        # A unit vector's components shrink with D; the MLP sees them at variance one
        width = self.sizes.embedding_dim
        scaled, hypothesis = (embedding * width**0.5).tensor_split([width], dim=1)  # [B, D]
        condition = self.embedding_mlp(scaled) + self.timestep_mlp(timestep_features(t))
        shift_of_embedding = self.embedding_shift(scaled)  # [B, H]
        if hypothesis.shape[1]:
            residual = (scaled - hypothesis) * hypothesis.any(dim=1, keepdim=True)
            extra = self.feedback(torch.cat([hypothesis, residual], dim=1))
            condition, shift_of_embedding = (
                x + y
                for x, y in zip((condition, shift_of_embedding), extra.chunk(2, dim=1), strict=True)
            )
        condition = F.silu(condition)  # [B, H]
        index = flat_index(positions)  # [M]

        x = self.token_table(tokens) + self.positions[: tokens.shape[1]]  # [B, L, H]
        for block in self.blocks[:-1]:
            x = block(x, condition)
        x = self.blocks[-1](x, condition, index)  # [B, L, H] or [M, H]

        shift, scale = self.modulation_out(condition).chunk(2, dim=-1)  # [B, H]
        shift = shift + shift_of_embedding
        rows = slice(None) if index is None else index // tokens.shape[1]
        if index is None:
            shift, scale = shift[:, None], scale[:, None]  # [B, 1, H]
        return modulate(self.norm_out(x), shift[rows], scale[rows])

    def output_states(
        self, tokens: Tensor, embedding: Tensor, t: Tensor, positions: Tensor | None = None
    ) -> Tensor:
        """Compute hidden states as `hidden_states`, pushed away from those without the embedding.

        h + w (h - U [h, e]), with the strength w in the sizes: classifier-free guidance (Ho and
        Salimans, 2022, arXiv 2207.12598, eq. 6) in one pass, since logits are linear in h, and h
        without the embedding nearly is in h and e (`unembed.training.export.fit_guidance`). None
        where all is masked: there it says how long the text is, and guidance makes it longer.
        """
        index = flat_index(positions)
        h = self.hidden_states(tokens, embedding, t, index)
        if not self.sizes.guidance:
            return h
        width, length = self.sizes.embedding_dim, tokens.shape[1]
        scaled = embedding[:, :width] * width**0.5  # [B, D]
        w = self.sizes.guidance * (t < 1.0).to(h)[:, None]  # [B, 1]
        if index is None:
            scaled, w = scaled[:, None].expand(-1, length, -1), w[:, None]
        else:
            scaled, w = scaled[index // length], w[index // length]
        unconditional: Tensor = self.unconditional(torch.cat([h, scaled.to(h)], dim=-1))
        return h + w * (h - unconditional)

    def forward(
        self, tokens: Tensor, embedding: Tensor, t: Tensor, positions: Tensor | None = None
    ) -> Tensor:
        """Predict logits at every position, or at some.

        The vocabulary projection is the largest product of the network, so callers that need
        some positions should say which.

        Args:
            tokens: Ids [B, L].
            embedding: Unit vectors [B, D].
            t: Timesteps [B].
            positions: Positions to predict, as a boolean [B, L] or as flat row-major indices [M];
                all when not given.

        Returns:
            [B, L, V], or [M, V] for the M positions, in row-major order.
        """
        h = self.output_states(tokens, embedding, t, positions)  # [B, L, H] or [M, H]
        if torch.is_grad_enabled() or h.device.type != "cpu":
            return F.linear(h, self.token_table.weight, self.output_bias)
        with torch.autocast("cpu", enabled=False):  # what is drawn from them should be no coarser
            return F.linear(h.float(), self.token_table.weight, self.output_bias)

    @torch.no_grad()
    def start_from_words(self, words: Tensor) -> None:
        """Start the token table from an encoder's word embeddings [V', H'], V' <= V.

        Where H' is not H the words are projected: onto their main directions when H is smaller,
        into a random orthonormal frame when it is larger. Rows beyond V' keep their random start.
        """
        words = words.to(self.token_table.weight)[: self.sizes.vocab_size]  # [V', H']
        spread = words.std()
        width, hidden = words.shape[1], self.sizes.hidden
        if width > hidden:
            centred = words - words.mean(dim=0)
            _, directions = torch.linalg.eigh(centred.T @ centred)  # ascending
            words = words @ directions[:, -hidden:]  # [V', H]
        elif width < hidden:
            frame = torch.empty(hidden, width, dtype=words.dtype)
            nn.init.orthogonal_(frame)
            words = words @ frame.T.to(words)  # [V', H]
        # The same scale whatever the projection did to it
        self.token_table.weight[: len(words)] = words * (spread / words.std())

    @torch.no_grad()
    def start_from_frequencies(self, counts: Tensor) -> None:
        """Start the output bias at the log frequency of each token, from counts [V].

        The network need not learn which tokens are rare, and its table is not bent to say so.
        """
        smoothed = counts.to(self.output_bias) + 0.5
        self.output_bias.copy_((smoothed / smoothed.sum()).log())

    @torch.no_grad()
    def start_from_pairs(self, tokens: Tensor, embedding: Tensor, pad_id: int) -> None:
        """Start the direct path from embeddings to words, in closed form.

        Alone it predicts softmax(T W e + log p) for the words of a text, with the token table T and
        their frequencies p. From W = 0 a step of Newton's method towards a text's own words y is
        s = H^-1 T'(y - p), H = T'(diag p - p p')T; W is the ridge regression of s on e, as long as
        serves pairs best that it was not made from, since far away the step is wrong. A path that
        serves none stays at zero.

        Args:
            tokens: Clean ids [N, L].
            embedding: Their unit vectors [N, D].
            pad_id: Id of the padding token.
        """
        table, scaled = self.token_table.weight, embedding * self.sizes.embedding_dim**0.5
        content = (tokens != pad_id).to(table)  # [N, L]
        share = content / content.sum(dim=1, keepdim=True).clamp(min=1.0)
        p = torch.bincount(tokens.flatten(), share.flatten(), self.sizes.vocab_size) / len(tokens)
        mean = p @ table  # T'p, [H]
        hessian = (table * p[:, None]).T @ table - torch.outer(mean, mean)
        spread = hessian.diagonal().mean().clamp(min=1e-12)
        hessian += _RIDGE_TABLE * spread * torch.eye(len(mean))
        words = F.embedding_bag(tokens, table, per_sample_weights=share, mode="sum")
        count = min(_MOST_APART, len(tokens) // 4)
        apart, rest = slice(None, count), slice(count, None)
        steps = torch.linalg.solve(hessian, (words - mean)[rest].T)  # s, [H, N]
        e = scaled[rest]  # [N, D]
        gram = e.T @ e + _RIDGE_PAIRS * len(e) / e.shape[1] * torch.eye(e.shape[1])
        path = torch.linalg.solve(gram, e.T @ steps.T).T  # W, [H, D]

        losses, bias = {}, (p + 1e-7).log()
        for length in _LENGTHS:
            logits = F.linear(length * (scaled[apart] @ path.T), table, bias)
            terms = logits.log_softmax(dim=1).gather(1, tokens[apart]) * share[apart]
            losses[length] = -float(terms.sum())
        best = min(losses, key=losses.__getitem__)
        self.embedding_shift.weight.copy_(best * path)


def parameter_counts(denoiser: nn.Module) -> tuple[int, int]:
    """Parameters (beside the vocabulary, of the vocabulary)."""
    vocabulary = {"token_table.weight", "output_bias"}
    beside = sum(p.numel() for n, p in denoiser.named_parameters() if n not in vocabulary)
    return beside, sum(p.numel() for p in denoiser.parameters()) - beside


def weights_digest(network: nn.Module) -> str:
    """SHA-256 of a network's weights in float32, whatever format they were loaded from."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()
