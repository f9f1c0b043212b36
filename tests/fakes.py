"""Stand-ins for tests: small sizes of the network."""

from dataclasses import replace

from unembed.denoiser import DenoiserSizes

_SIZES = {
    "tiny": DenoiserSizes(30_522, 384, hidden=64, layers=2, heads=2, feed_forward=128),
    "small": DenoiserSizes(30_522, 384, hidden=384, layers=4, heads=6, feed_forward=1536),
    "reference": DenoiserSizes(30_522, 384),
}


def preset(name: str, **changes: int) -> DenoiserSizes:
    """Return named sizes with some fields changed (at least the vocabulary, usually)."""
    return replace(_SIZES[name], **changes)
