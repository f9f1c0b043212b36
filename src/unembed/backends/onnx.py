"""The denoiser as an ONNX file, and that file as a denoiser (extra ``onnx``)."""

from __future__ import annotations

import hashlib
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from unembed.denoiser import Denoiser
from unembed.errors import CheckpointError
from unembed.files import atomic, require_extra

FILE = "denoiser.onnx"
_DIGEST = "weights_sha256"
_MOST = 1 << 30  # of texts and positions; PyTorch 2.6 refuses a size without a limit
_INPUTS = ("tokens", "embedding", "t", "index")


def export_onnx(denoiser: Denoiser, folder: Path, out: Path) -> None:
    """Write the denoiser as ONNX, float32, for any batch and any number of positions.

    Inputs: tokens int64 [B, L], embedding float32 [B, D], t float32 [B] and index int64 [M], the
    flat row-major positions wanted. Output: logits float32 [M, V].

    Args:
        denoiser: With the weights of the folder.
        folder: The inverter's; the digest of its weights is kept in the ONNX file.
        out: File to write. In that folder, as ``denoiser.onnx``, `Inverter` finds it.

    Raises:
        ConfigError: The extra is not installed.
        CheckpointError: This PyTorch cannot, or the file cannot be written.
    """
    require_onnx()
    sizes = denoiser.sizes
    example = (
        torch.zeros(2, sizes.length, dtype=torch.long),
        torch.ones(2, sizes.embedding_dim),
        torch.ones(2),
        torch.arange(3),
    )
    batch, count = (torch.export.Dim(name, max=_MOST) for name in "BM")
    tokens = {0: batch, 1: torch.export.Dim("L", max=sizes.length)} if sizes.prefix else {0: batch}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's, about itself
        try:
            program = torch.onnx.export(
                _Indexed(denoiser).eval(),
                example,
                dynamo=True,
                input_names=list(_INPUTS),
                output_names=["logits"],
                dynamic_shapes=(tokens, {0: batch}, {0: batch}, {0: count}),
                verbose=False,
            )
        except torch.onnx.OnnxExporterError as error:
            raise CheckpointError(
                f"the denoiser as ONNX from PyTorch {torch.__version__}",
                str(error.__cause__ or error)[:300],
                "Upgrade PyTorch (2.6 cannot), or leave --onnx out",
            ) from error
    assert program is not None
    program.model.metadata_props[_DIGEST] = _digest(folder)
    try:
        with atomic(out) as temporary:
            program.save(temporary)
    except OSError as error:
        raise CheckpointError(
            f"a place to write {out}", str(error), "Choose another --onnx"
        ) from error


class OnnxDenoiser:
    """The file as a denoiser for `unembed.decoding`, on the CPU with torch's number of threads.

    Args:
        path: From `export_onnx`, in the folder whose weights it is of.

    Raises:
        CheckpointError: The file is damaged or was exported from other weights.
    """

    def __init__(self, path: Path) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3  # errors
        try:
            self._session = onnxruntime.InferenceSession(
                path, options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # the library raises its own classes of every kind
            raise CheckpointError(
                f"an ONNX file at {path}", str(error).splitlines()[0], "Export or delete it"
            ) from error
        digest = self._session.get_modelmeta().custom_metadata_map.get(_DIGEST)
        if digest != _digest(path.parent):
            raise CheckpointError(
                f"the weights beside it in {path}", "others", "Export it again or delete it"
            )

    def __call__(self, tokens: Tensor, embedding: Tensor, t: Tensor, positions: Tensor) -> Tensor:
        """See `unembed.denoiser.Denoiser.forward`; logits float32 [M, V]."""
        index = positions.flatten().nonzero()[:, 0]
        inputs = (tokens, embedding.float(), t.float(), index)
        arrays = {n: x.contiguous().numpy() for n, x in zip(_INPUTS, inputs, strict=True)}
        return torch.from_numpy(self._session.run(None, arrays)[0])


def onnx_is_here() -> bool:
    """Tell whether ONNX Runtime is installed."""
    from importlib.util import find_spec

    return find_spec("onnxruntime") is not None


class _Indexed(nn.Module):
    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        self.denoiser = denoiser

    def forward(self, tokens: Tensor, embedding: Tensor, t: Tensor, index: Tensor) -> Any:
        return self.denoiser(tokens, embedding, t, index)


def require_onnx() -> None:
    """Refuse to go on without what the export needs.

    Raises:
        ConfigError: The extra is not installed.
    """
    require_extra("onnx", "--onnx", "leave it out")


def _digest(folder: Path) -> str:
    """SHA-256 of an inverter's weights, in however many files they are."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        digest.update(path.read_bytes())
    return digest.hexdigest()
