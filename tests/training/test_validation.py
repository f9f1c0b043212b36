import numpy as np
import pytest
import torch

from unembed.data.pairs import Pairs
from unembed.device import choose_compute
from unembed.evaluation.metrics import exact_match, token_accuracy
from unembed.training import validation
from unembed.training.validation import decode_held_out, validate

CPU = choose_compute("cpu", "float32")


@pytest.fixture
def opened(pairs_folder):
    return Pairs.open(pairs_folder)


def test_decode_held_out_decoded_figures_are_those_of_the_inverter(
    inverter, opened, tiny_config, encoder
):
    """Same weights, same vectors, by the path that users take and the metrics they are shown."""
    figures = decode_held_out(inverter.denoiser, opened, tiny_config, CPU, encoder)
    tokens, vectors = opened.rows(np.arange(8))  # decoded_pairs is 64, held out are 8
    found = inverter.invert(vectors)
    originals = [
        [ids[i] for i in encoder.tokenizer.content_positions(ids)] for ids in tokens.tolist()
    ]
    pairs = list(zip(originals, (list(i.token_ids) for i in found), strict=True))
    wanted = np.mean([token_accuracy(*pair) for pair in pairs])
    assert figures["decoded_token_accuracy"] == pytest.approx(wanted) and wanted > 0.0
    assert figures["decoded_exact_match"] == np.mean([exact_match(*pair) for pair in pairs])
    again = encoder.encode([inversion.text for inversion in found])
    cosine = float((again * vectors).sum(axis=1).mean())
    assert figures["decoded_cosine"] == pytest.approx(cosine, abs=1e-5)


def test_without_an_encoder_there_is_no_cosine_and_with_no_pairs_nothing(
    inverter, opened, tiny_config
):
    figures = decode_held_out(inverter.denoiser, opened, tiny_config, CPU)
    assert set(figures) == {"decoded_token_accuracy", "decoded_exact_match"}
    training = tiny_config.training.model_copy(update={"decoded_pairs": 0})
    none = tiny_config.model_copy(update={"training": training})
    assert decode_held_out(inverter.denoiser, opened, none, CPU) == {}


def test_validate_validation_draws_the_same_masks_every_time(inverter, opened, tiny_config):
    torch.manual_seed(1)
    first = validate(inverter.denoiser, opened, tiny_config, CPU)
    torch.rand(5)
    assert validate(inverter.denoiser, opened, tiny_config, CPU) == first


def test_a_large_vocabulary_is_validated_a_part_at_a_time(
    inverter, opened, tiny_config, monkeypatch
):
    """The same figures, from five rows of logits at a time."""
    rows, original = [], torch.nn.functional.cross_entropy

    def spy(logits, *given, **options):
        rows.append(len(logits))
        return original(logits, *given, **options)

    monkeypatch.setattr(validation.F, "cross_entropy", spy)
    found = []
    for logits in (1 << 27, 5 * inverter.tokenizer.size):
        rows.clear()
        monkeypatch.setattr(validation, "_LOGITS", logits)
        figures = validate(inverter.denoiser, opened, tiny_config, CPU)
        found.append(
            (figures | decode_held_out(inverter.denoiser, opened, tiny_config, CPU), rows[:])
        )
    (whole, large), (parts, small) = found
    assert parts == pytest.approx(whole, rel=1e-5)
    assert len(large) == 2 and max(small) == 5 and sum(small) == sum(large)
