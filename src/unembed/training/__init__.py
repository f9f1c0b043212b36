"""Training a denoiser: the loop, its state on disk, the averaged weights."""
