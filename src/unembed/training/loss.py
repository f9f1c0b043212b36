"""The training loss: vocabulary projection and cross-entropy, never holding all logits.

The logits of a batch, [M, V], are the largest tensor of training: gigabytes at a vocabulary of
262 K. Softmax cross-entropy has a closed gradient, (p - onehot) * weight, so a chunk of rows can be
projected, scored and turned into gradients before the next one, at the cost of the same three
matrix products as the plain path and no recomputation. With a sampler the softmax is over part of
the vocabulary only.

A guard tells bad steps on the device; they are never applied, and reported when the host asks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from unembed.denoiser import Denoiser
from unembed.diffusion import Candidates
from unembed.errors import TrainingError

if TYPE_CHECKING:
    from unembed.config import TrainingSection

# Logits at a time: few enough for a CPU's cache and allocator, enough to fill a GPU
_CHUNK_LOGITS = {"cpu": 1 << 23, "cuda": 1 << 27}
_BLOCK = 64  # rows: what the kernels of a product divide it into
_CHUNKS_PER_SUM = 8  # products added in the format of h before float32 takes their sum


def _rows_at_a_time(device: str, vocabulary: int) -> int:
    rows = max(1, _CHUNK_LOGITS.get(device, _CHUNK_LOGITS["cpu"]) // vocabulary)
    return rows - rows % _BLOCK if rows > _BLOCK else rows


class _Rows(torch.autograd.Function):
    """Rows of a table, table[ids] for ascending ids, with a gradient of those rows alone.

    It is sparse, and autograd adds it in place to the dense one that the same table has as the
    input embedding: a step fills one gradient [V, H] and not two.
    """

    @staticmethod
    def forward(ctx: Any, table: Tensor, ids: Tensor) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.shape = table.shape
        return table[ids]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (ids,) = ctx.saved_tensors
        gradient = torch.sparse_coo_tensor(
            ids[None], grads[0], ctx.shape, is_coalesced=True, check_invariants=False
        )
        return gradient, None


class _LinearCrossEntropy(torch.autograd.Function):
    """Sum of weighted cross-entropies of h @ table.T + bias; gradients made on the way forward.

    The products run in the format of h; sums over chunks are float32.
    """

    @staticmethod
    def forward(
        ctx: Any, h: Tensor, table: Tensor, bias: Tensor, targets: Tensor, weights: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        matrix, offset = table.to(h.dtype), bias.to(h.dtype)
        losses = torch.empty(len(h), device=h.device, dtype=torch.float32)
        hits = torch.empty(len(h), device=h.device, dtype=torch.bool)
        grad_h = torch.empty_like(h)
        grad_bias = torch.zeros_like(bias)
        grad_table = partial = None
        if ctx.needs_input_grad[1]:
            grad_table, partial = torch.zeros_like(table), torch.zeros_like(matrix)
        size = _rows_at_a_time(h.device.type, len(table))
        chunks = math.ceil(len(h) / size)
        for index in range(1, chunks + 1):
            rows = slice((index - 1) * size, index * size)
            logits = F.linear(h[rows], matrix, offset)  # [R, V]
            target, weight = targets[rows, None], weights[rows, None]  # [R, 1]
            target_logits, top = logits.gather(1, target), logits.amax(dim=-1, keepdim=True)
            hits[rows] = (target_logits == top)[:, 0]
            p = logits.softmax(dim=-1)
            # -log p_target, by way of the largest p so that nothing underflows. Twice amax: on a
            # CPU it is four times as quick as max, which also says where
            largest = p.amax(dim=-1, keepdim=True)
            losses[rows] = (top.float() - largest.float().log() - target_logits.float())[:, 0]
            # d loss / d logits = weight * (p - onehot); the weight goes to the small factors
            p.scatter_add_(1, target, p.new_full(target.shape, -1.0))
            grad_bias += weights[rows].to(p) @ p
            grad_h[rows] = (p @ matrix) * weight.to(p)
            if grad_table is not None and partial is not None:
                partial.addmm_(p.T, (h[rows] * weight).to(p))
                if index % _CHUNKS_PER_SUM == 0 or index == chunks:
                    grad_table += partial
                    partial.zero_()
        ctx.save_for_backward(grad_h, grad_bias)
        ctx.grad_table = grad_table
        ctx.mark_non_differentiable(losses, hits)
        return (losses * weights).sum(), losses, hits

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_h, grad_bias = ctx.saved_tensors
        upstream = grads[0]
        grad_table = None if ctx.grad_table is None else ctx.grad_table * upstream
        return grad_h * upstream.to(grad_h), grad_table, grad_bias * upstream, None, None


class ChunkedCrossEntropy(nn.Module):
    """The fast twin of `diffusion.cross_entropy_of`, for the tied output of our denoiser.

    A module around the denoiser, because that is what data-parallel training wraps.

    Args:
        denoiser: The network.
        compile: Run its hidden states through ``torch.compile``; the loss below is loops over
            chunks,
            which it would unroll.

    Attributes:
        tally: Positions scored since it was last set to zero, and how many of their tokens had the
            largest logit (ties included), [2] on the device. Entries of weight 0 do not count.
    """

    def __init__(self, denoiser: Denoiser, compile: bool = False) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.tally = torch.zeros(2, device=denoiser.output_bias.device)
        states = denoiser.hidden_states
        self._hidden_states = torch.compile(states) if compile else states

    def forward(
        self,
        xt: Tensor,
        embedding: Tensor,
        t: Tensor,
        index: Tensor,
        targets: Tensor,
        weights: Tensor,
        candidates: Candidates | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Compute the weighted sum and the M cross-entropies; see `diffusion_loss`."""
        h = self._hidden_states(xt, embedding, t).flatten(0, 1)[index]  # [M, H]
        device = h.device.type
        if torch.is_autocast_enabled(device):
            h = h.to(torch.get_autocast_dtype(device))  # it leaves in-place products alone
        table: Tensor = self.denoiser.token_table.weight
        bias: Tensor = self.denoiser.output_bias
        if candidates is not None:
            table = _Rows.apply(table, candidates.ids)  # type: ignore[no-untyped-call]
            bias = bias[candidates.ids] - candidates.log_inclusion
            targets = torch.searchsorted(candidates.ids, targets)
        with torch.autocast(device, enabled=False):
            total, losses, hits = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
                h, table, bias, targets, weights
            )
        if candidates is None:  # the best of some tokens is not the best of all
            scored = weights > 0
            self.tally += torch.stack([scored.sum(), (hits & scored).sum()])
        return total, losses


# A softmax over part of the vocabulary


class CandidateSampler:
    """A sampler of the tokens a softmax is over: targets, the most frequent, and random others.

    Args:
        counts: How often each token of the vocabulary is a target [V]; proportional is enough.
        size: Candidates beside the targets, half of them the most frequent tokens; at least 2.
    """

    def __init__(self, counts: NDArray[np.float64], size: int) -> None:
        order = torch.from_numpy(np.argsort(-counts, kind="stable"))
        self._frequent, self._others = order[: size // 2], order[size // 2 :]
        self._random = min(size - size // 2, len(self._others))
        self._shares = torch.from_numpy(counts / counts.sum())  # [V]

    def draw(self, targets: Tensor, generator: torch.Generator) -> Candidates:
        """Draw the candidates for a batch's targets [M], on their device; a GPU is waited for."""
        picks = torch.randperm(len(self._others), generator=generator)[: self._random]
        mask = torch.zeros(len(self._shares), dtype=torch.bool)
        for ids in (self._frequent, self._others[picks], targets.cpu()):
            mask[ids] = True
        # A token is left out when neither the draw nor any of the M targets is it
        chance = self._random / max(len(self._others), 1)
        inclusion = 1.0 - (1.0 - self._shares) ** len(targets) * (1.0 - chance)
        inclusion[self._frequent] = 1.0
        ids = mask.nonzero()[:, 0]
        log_inclusion = inclusion[ids].log().float()
        return Candidates(ids, log_inclusion).to(targets.device)


# A guard against bad steps

_WINDOW = 100  # steps in the running average
_WARMUP = 20  # good steps before a loss can be said to explode
_FLOOR = 0.1  # a lower average, in nats, may jump about without anything being wrong
_MOST_IN_A_ROW = 100  # bad steps in a row


@dataclass(frozen=True)
class GuardReport:
    """Report of the guard on a run.

    Attributes:
        good: Steps applied, over the whole run.
        skipped: Steps not applied.
        in_a_row: Of these, since the last good one.
        loss: Of the last bad step.
        norm: Gradient norm of the last bad step.
    """

    good: int
    skipped: int
    in_a_row: int
    loss: float
    norm: float


class LossGuard:
    """Tells whether a step's loss and gradient are finite and the loss of the usual size.

    Everything is a tensor on the device, so that a step need not wait for the answer: the
    optimiser is handed it and leaves weights and moments alone.

    Args:
        settings: ``on_bad_loss`` and ``explosion``.
        device: Of the run.
    """

    def __init__(self, settings: TrainingSection, device: torch.device) -> None:
        self._stops = settings.on_bad_loss == "stop"
        self._explosion = settings.explosion
        # Running average, good steps, skipped, skipped in a row, norm of the last good step
        self.state = torch.zeros(5, device=device)
        self._bad = torch.zeros(2, device=device)  # loss and norm of the last bad step, not saved
        self._reported = 0

    @property
    def norm(self) -> Tensor:
        """Gradient norm of the last good step."""
        return self.state[4]

    @torch.no_grad()
    def judge(self, loss: Tensor, norm: Tensor) -> Tensor:
        """Judge a step: 1.0 if it is bad, 0.0 if it is good, on the device."""
        average, good, skipped, row, last = self.state.unbind()
        exploded = (good >= _WARMUP) & (loss > self._explosion * average.clamp_min(_FLOOR))
        bad = ~torch.isfinite(loss) | ~torch.isfinite(norm) | exploded
        share = 1.0 / (good + 1.0).clamp(max=_WINDOW)
        self.state = torch.stack(
            [
                torch.where(bad, average, average + share * (loss - average)),
                good + ~bad,
                skipped + bad,
                torch.where(bad, row + 1.0, 0.0),
                torch.where(bad, last, norm),
            ]
        )
        self._bad = torch.where(bad, torch.stack([loss, norm]), self._bad)
        return bad.float()

    def report(self) -> GuardReport:
        """Read what the guard knows; waits for the device."""
        values, (loss, norm) = self.state.tolist(), self._bad.tolist()
        return GuardReport(int(values[1]), int(values[2]), int(values[3]), loss, norm)

    def restore(self, state: Tensor) -> None:
        """Restore a saved ``state``, whose bad steps were reported when they happened."""
        self.state = state.to(self.state.device)
        self._reported = self.report().skipped

    def check(self, step: int, latest: Path) -> GuardReport:
        """Check for bad steps since the last check, and end the run when it should end.

        Args:
            step: Steps done.
            latest: Where the last good state is, if one was saved, for the message.

        Raises:
            TrainingError: There was one and ``on_bad_loss`` is ``stop``, or a hundred in a row.
        """
        report = self.report()
        stop = self._stops and report.skipped > self._reported
        if stop or report.in_a_row >= _MOST_IN_A_ROW:
            finite = math.isfinite(report.loss) and math.isfinite(report.norm)
            size = f" of at most {self._explosion:g} times its running average"
            raise TrainingError(
                f"a finite loss{size if finite else ''}",
                f"loss {report.loss:g}, gradient norm {report.norm:g} by step {step} "
                f"({report.skipped} bad steps in all, none applied)",
                f"{_advice(latest)}, or set training.on_bad_loss=skip",
            )
        self._reported = report.skipped
        return report


def _advice(latest: Path) -> str:
    if latest.exists():
        return f"The last good state is in {latest}; lower training.lr and resume"
    return "No state was saved yet; lower training.lr and start again"
