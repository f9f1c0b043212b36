import copy
import io
import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.fakes import preset
from unembed import checkpoints, device
from unembed.backends import cpu
from unembed.checkpoints import Storage
from unembed.decoding import STRATEGIES, Decoding
from unembed.denoiser import Denoiser
from unembed.encoders.base import FakeEncoder
from unembed.encoders.fingerprint import make_fingerprint
from unembed.encoders.vectors import as_unit_vectors
from unembed.errors import (
    CheckpointError,
    ConfigError,
    EmbeddingError,
    EncoderError,
    UnembedError,
)
from unembed.inverter import Inverter, shipped_inverters


@pytest.fixture(scope="module")
def inverter() -> Inverter:
    encoder = FakeEncoder()
    torch.manual_seed(0)
    network = Denoiser(
        preset("tiny", vocab_size=encoder.tokenizer.size, embedding_dim=32, length=12)
    )
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(std=0.2)
    process = {"schedule": "log-linear", "rate": 5.0}
    return Inverter(network, encoder.tokenizer, encoder.identity, process)


@pytest.fixture(scope="module")
def vectors() -> np.ndarray:
    return FakeEncoder().encode(["the cat runs", "a dog sleeps by the river", "rain", "bank law"])


def test_invert_it_accepts_every_kind_of_vector(inverter, vectors):
    def tokens(given) -> list[list[int]]:
        return [item.token_ids for item in inverter.invert(given)]

    expected = tokens(vectors)
    assert len(expected) == 4
    assert tokens(vectors.tolist()) == expected
    assert tokens(torch.from_numpy(vectors)) == expected
    assert tokens(vectors[1]) == [expected[1]]
    assert tokens(vectors * 7.5) == expected, "the norm does not matter"
    assert tokens(torch.from_numpy(vectors).double()) == expected


def test_invert_half_precision_vectors_decode(inverter, vectors):
    half = inverter.invert(vectors.astype(np.float16))
    assert len(half) == 4 and all(item.passes == 8 for item in half)
    found = [item.token_ids for item in half]
    assert found == [item.token_ids for item in inverter.invert(vectors)]


def test_invert_other_weights_or_another_network_are_decoded_with_at_once(inverter, vectors):
    mine = copy.copy(inverter)
    mine.denoiser = copy.deepcopy(inverter.denoiser)
    expected = mine.invert(vectors)
    started = {name: p.detach().clone() for name, p in mine.denoiser.state_dict().items()}
    shuffled = {**started, "token_table.weight": started["token_table.weight"].flip(0)}
    mine.denoiser.load_state_dict(shuffled)
    assert [i.token_ids for i in mine.invert(vectors)] != [i.token_ids for i in expected]
    mine.denoiser.load_state_dict(started, assign=True)  # other tensors, not others' numbers
    assert mine.invert(vectors) == expected
    mine.denoiser = copy.deepcopy(mine.denoiser)
    mine.denoiser.load_state_dict(shuffled)
    assert [i.token_ids for i in mine.invert(vectors)] != [i.token_ids for i in expected]


def test_invert_another_format_decodes_and_leaves_the_weights_alone(inverter, vectors, tmp_path):
    expected = inverter.invert(vectors)
    before = {name: tensor.clone() for name, tensor in inverter.denoiser.state_dict().items()}
    try:
        inverter.to("cpu", "bfloat16")
        coarse = inverter.invert(vectors)
        assert [i.confidences for i in coarse] != [i.confidences for i in expected]
        inverter.save_pretrained(tmp_path / "saved")
    finally:
        inverter.to("cpu")
    assert inverter.invert(vectors) == expected, "a CPU's format is float32 unless another is asked"
    for name, tensor in inverter.denoiser.state_dict().items():
        assert torch.equal(tensor, before[name])
    with pytest.raises(ConfigError, match="dtype"):
        inverter.to("cpu", "float8")


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_invert_batch_size_changes_nothing(inverter, vectors, batch_size):
    found = inverter.invert(vectors, batch_size=batch_size)
    for one, other in zip(found, inverter.invert(vectors), strict=True):
        assert one.token_ids == other.token_ids
        assert one.confidences == pytest.approx(other.confidences, rel=1e-4)


def test_invert_vectors_of_several_calls_put_together_draw_as_in_their_own(inverter, vectors):
    options = {"strategy": "euler", "steps": 6}
    alone = inverter.invert(vectors[:2], seed=7, **options)
    alone += inverter.invert(vectors[2:], seed=9, **options)
    draws = [(7, 0), (7, 1), (9, 0), (9, 1)]
    for batch_size in (3, 64):
        both = inverter.invert(vectors, draws=draws, batch_size=batch_size, **options)
        assert [item.token_ids for item in both] == [item.token_ids for item in alone]
    assert [i.token_ids for i in inverter.invert(vectors, seed=7, **options)] != [
        i.token_ids for i in alone
    ]


def test_invert_the_same_call_gives_the_same_result(inverter, vectors):
    assert inverter.invert(vectors, seed=3) == inverter.invert(vectors, seed=3)


def test_invert_results_are_consistent(inverter, vectors):
    for item in inverter.invert(vectors, steps=4):
        assert item.text == inverter.tokenizer.decode([item.token_ids])[0]
        assert len(item.token_ids) == len(item.confidences)
        assert all(0 < c <= 1 for c in item.confidences)
        assert item.passes == 4 and item.encoder_calls == 0


def test_from_pretrained_saved_and_loaded_it_is_the_same(inverter, vectors, tmp_path):
    inverter.save_pretrained(tmp_path / "saved")
    names = {path.name for path in (tmp_path / "saved").iterdir()}
    assert names == {"config.json", "model.safetensors", "tokenizer.json", "README.md"}
    loaded = Inverter.from_pretrained(tmp_path / "saved")
    assert loaded.encoder == inverter.encoder
    assert loaded.tokenizer.digest == inverter.tokenizer.digest
    for (name, a), b in zip(
        inverter.denoiser.named_parameters(), loaded.denoiser.parameters(), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6, msg=name)
    # float16 once is float16 for ever
    loaded.save_pretrained(tmp_path / "again")
    again = Inverter.from_pretrained(str(tmp_path / "again"))
    assert again.invert(vectors) == loaded.invert(vectors)


def fully_masked(inverter, vectors):
    """Tokens, embeddings, timesteps and the index of every position."""
    tokens = torch.full((len(vectors), inverter.length), inverter.tokenizer.mask_id)
    return tokens, torch.from_numpy(vectors), torch.ones(len(vectors)), torch.arange(tokens.numel())


@torch.no_grad()
@pytest.mark.parametrize(
    ("storage", "number"),
    [
        (Storage("float16"), 1),
        (Storage("bfloat16"), 1),
        (Storage("int8"), 2),  # refused by a version that would not know what to do with it
        (Storage("float16", "50KB"), 2),
    ],
)
def test_any_storage_loads_and_is_kept_on_saving_again(
    inverter, vectors, tmp_path, monkeypatch, storage, number
):
    monkeypatch.setattr(inverter, "storage", storage)
    inverter.save_pretrained(tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config["format"] == number
    loaded = Inverter.from_pretrained(tmp_path / "saved")
    logits = [model.denoiser(*fully_masked(model, vectors)) for model in (inverter, loaded)]
    assert torch.linalg.norm(logits[1] - logits[0]) < 0.06 * torch.linalg.norm(logits[0])
    loaded.save_pretrained(tmp_path / "again")
    again = Inverter.from_pretrained(tmp_path / "again")
    assert again.storage.number_format == storage.number_format
    assert again.invert(vectors) == loaded.invert(vectors)


def test_storage_int8_is_half_the_size_of_float16(inverter, tmp_path, monkeypatch):
    sizes = []
    for name in ("float16", "int8"):
        monkeypatch.setattr(inverter, "storage", Storage(name))
        inverter.save_pretrained(tmp_path / name)
        sizes.append((tmp_path / name / "model.safetensors").stat().st_size)
    assert sizes[1] < 0.6 * sizes[0]


def test_from_pretrained_the_curves_travel_with_the_card(inverter, tmp_path, monkeypatch):
    monkeypatch.setattr(inverter, "curves", b"a picture")
    inverter.save_pretrained(tmp_path / "saved")
    Inverter.from_pretrained(tmp_path / "saved").save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "curves.png").read_bytes() == b"a picture"


def test_save_pretrained_cut_short_leaves_the_earlier_one_whole(inverter, tmp_path, monkeypatch):
    inverter.save_pretrained(tmp_path)
    earlier = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def killed(state, number_format):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints, "pack", killed)
    with pytest.raises(KeyboardInterrupt):
        inverter.save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == earlier
    assert Inverter.from_pretrained(tmp_path).length == inverter.length


def test_from_pretrained_training_facts_and_card_survive(inverter, tmp_path):
    inverter.card = "---\nlicense: apache-2.0\n---\n# Mine\n"
    inverter.trained = {"config": {"data": {"length": 12}}}
    try:
        inverter.save_pretrained(tmp_path)
    finally:
        card, inverter.card, inverter.trained = inverter.card, None, {}
    loaded = Inverter.from_pretrained(tmp_path)
    assert loaded.card == card
    assert loaded.trained == {"config": {"data": {"length": 12}}}


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (np.ones(31), "32 dimensions"),
        (np.ones((2, 2, 32)), "shape"),
        (np.full(32, np.nan), "NaN or infinity in vector 0"),
        (np.r_[np.inf, np.ones(31)], "NaN or infinity"),
        (np.stack([np.ones(32), np.zeros(32)]), "only zeros in vector 1"),
        ([["a"] * 32], "numbers"),
        ([[1.0, 2.0], [1.0]], "numbers"),
        (None, "32 dimensions"),
    ],
)
def test_vectors_that_cannot_be_inverted_are_refused(inverter, bad, message):
    with pytest.raises(EmbeddingError, match=message):
        inverter.invert(bad)


def test_invert_no_vectors_give_no_texts(inverter):
    assert inverter.invert(np.empty((0, 32))) == []


def test_as_unit_vectors_huge_and_tiny_vectors_are_normalised():
    for scale in (1e30, 1e-30):
        unit = as_unit_vectors(np.full(4, scale), 4)
        np.testing.assert_allclose(unit, 0.5, rtol=1e-6)


VECTOR_ONLY = [name for name, kind in STRATEGIES.items() if not kind.needs_encoder]


@pytest.mark.parametrize("name", VECTOR_ONLY)
def test_invert_strategies_do_not_care_about_batches_norms_or_number_formats(
    inverter, vectors, name
):
    expected = inverter.invert(vectors, strategy=name, steps=5, seed=4)
    assert inverter.invert(vectors * 4.0, strategy=name, steps=5, seed=4) == expected
    doubled = vectors.astype(np.float64) * 1e-6
    alone = [
        inverter.invert(v, strategy=name, steps=5, seed=4, first_index=i)[0]
        for i, v in enumerate(doubled)
    ]
    assert [item.token_ids for item in alone] == [item.token_ids for item in expected]
    assert [item.passes for item in alone] == [item.passes for item in expected]
    half = inverter.invert(vectors.astype(np.float16), strategy=name, steps=5, seed=4)
    as_read = vectors.astype(np.float16).astype(np.float32)
    assert half == inverter.invert(as_read, strategy=name, steps=5, seed=4)


def test_invert_each_vector_has_its_own_randomness(inverter, vectors):
    same = np.repeat(vectors[:1], 6, axis=0)
    found = inverter.invert(same, strategy="euler", seed=1)
    assert len({tuple(item.token_ids) for item in found}) > 1
    assert found != inverter.invert(same, strategy="euler", seed=2)


def test_invert_options_reach_the_strategy(inverter, vectors):
    plain = inverter.invert(vectors)
    ordered = inverter.invert(vectors, options={"order": "left-to-right"})
    assert [i.token_ids for i in plain] != [i.token_ids for i in ordered]
    with pytest.raises(ConfigError, match="an option of the strategy greedy"):
        inverter.invert(vectors, options={"temperature": 1.0})


def test_guidance_runs_the_denoiser_twice_a_pass(inverter, vectors):
    plain = inverter.invert(vectors, steps=6)
    guided = inverter.invert(vectors, steps=6, guidance=(0.0, 3.0))
    nothing = inverter.invert(vectors, steps=6, guidance=(0.0, 0.0))
    assert [i.token_ids for i in nothing] == [i.token_ids for i in plain]
    assert [i.passes for i in nothing] == [2 * i.passes for i in plain]
    assert [i.token_ids for i in guided] != [i.token_ids for i in plain]


def test_invert_repetition_costs_unless_it_is_free(inverter, vectors):
    free, usual, dear = (
        [i.token_ids for i in inverter.invert(vectors, repetition=r, steps=12)]
        for r in (0.0, 2.0, 100.0)
    )
    assert usual == [i.token_ids for i in inverter.invert(vectors, steps=12)]
    assert any(len(set(ids)) < len(ids) for ids in free)
    assert all(len(set(ids)) == len(ids) for ids in dear)
    with pytest.raises(ConfigError, match="repetition of at least 0"):
        inverter.invert(vectors, repetition=-1.0)


@dataclass(frozen=True)
class FirstGuess:
    """A strategy that asks the encoder about greedy's text and about nothing else."""

    needs_encoder = True

    def __call__(self, denoiser, embedding, spec, *, oracle, **options):
        decoded = Decoding.of("greedy").strategy(denoiser, embedding, spec, **options)
        oracle(range(len(embedding)), decoded.tokens)
        return replace(decoded, encoder_calls=oracle.calls)


def test_invert_gives_a_strategy_that_calls_the_encoder_an_oracle(inverter, vectors):
    calling = Decoding(FirstGuess(), encoder_calls=2)
    inversions = inverter.invert(vectors, decoding=calling, encoder=FakeEncoder(), batch_size=3)
    assert all(item.encoder_calls == bool(item.text) for item in inversions)
    assert any(item.text for item in inversions)
    with pytest.raises(ConfigError, match="found no encoder"):
        inverter.invert(vectors, decoding=calling)
    with pytest.raises(ConfigError, match="found 0 encoder calls"):
        inverter.invert(vectors, decoding=Decoding(FirstGuess()), encoder=FakeEncoder())
    with pytest.raises(EncoderError):
        inverter.invert(vectors, decoding=calling, encoder=FakeEncoder(dimension=16))


@pytest.mark.parametrize(
    ("dtype", "formats"),
    [
        (None, [torch.float32, torch.bfloat16]),
        ("float32", [torch.float32, torch.float32]),
        ("bfloat16", [torch.bfloat16, torch.bfloat16]),
    ],
)
def test_invert_a_search_takes_the_quickest_format_unless_one_is_given(
    inverter, vectors, monkeypatch, dtype, formats
):
    monkeypatch.setattr(device, "_bfloat16_is_quicker", lambda device: True)
    made = []

    def fast_form(denoiser, compute):
        made.append(compute.dtype)
        return cpu.fast_form(denoiser, compute)

    monkeypatch.setattr("unembed.inverter.fast_form", fast_form)
    monkeypatch.setattr(inverter, "_fast", {})
    try:
        inverter.to("cpu", dtype)
        for _ in range(2):  # each form is made once
            inverter.invert(vectors[:1])
            calling = Decoding(FirstGuess(), encoder_calls=2)
            inverter.invert(vectors[:1], decoding=calling, encoder=FakeEncoder())
    finally:
        inverter.to("cpu")
    assert made == (formats if formats[0] != formats[1] else formats[:1])


@pytest.mark.parametrize(
    "options",
    [
        {"steps": 0},
        {"steps": 1.5},
        {"batch_size": 0},
        {"strategy": "psychic"},
        {"seed": "a"},
        {"seed": -1},
        {"guidance": 1.0},
        {"decoding": 3},
        {"decoding": "greedy", "steps": 3},
        {"speed": 2},
        {"on_step": 3},
        {"corpus": "x"},
        {"corpus": lambda vectors: []},
        {"draws": [(0, 1)]},
        {"draws": [1, 2, 3, 4]},
        {"draws": [(0, 1.5)] * 4},
        {"draws": [(0, -1)] * 4},
        {"draws": 5},
    ],
)
def test_invert_bad_options_are_refused(inverter, vectors, options):
    with pytest.raises(ConfigError):
        inverter.invert(vectors, **options)


def test_invert_refuses_what_is_no_encoder(inverter, vectors):
    calls = {"strategy": "best-of", "encoder_calls": 2, "encoder": "all-MiniLM-L6-v2"}
    with pytest.raises(EncoderError, match=r"an encoder; found str 'all-.*unembed.load_encoder"):
        inverter.invert(vectors, **calls)


@pytest.mark.parametrize("kind", [np.asanyarray, list, tuple])
def test_as_unit_vectors_takes_what_is_masked_for_no_number(kind):
    array = np.ma.masked_array(np.ones((2, 4), np.float32), mask=False)
    assert as_unit_vectors(kind(array), 4).tolist() == [[0.5] * 4] * 2
    array[1, 2] = np.ma.masked
    with pytest.raises(EmbeddingError, match="NaN or infinity in vector 1"):
        as_unit_vectors(kind(array), 4)


def damage_truncate(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])


def damage_missing_weights(folder):
    (folder / "model.safetensors").unlink()


def damage_config(folder):
    (folder / "config.json").write_text("{")


def damage_config_key(folder):
    config = json.loads((folder / "config.json").read_text())
    del config["denoiser_sizes"]
    (folder / "config.json").write_text(json.dumps(config))


def damage_format(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "format": 99}))


def damage_sizes(folder):
    config = json.loads((folder / "config.json").read_text())
    config["denoiser_sizes"]["hidden"] = 128
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("diffusion_process", value) for value in (None, 5, {}, [], {"schedule": "linear"})),
        ("diffusion_process", {"schedule": "cosine", "rate": 5.0}),
        ("diffusion_process", {"schedule": "log-linear", "rate": -1.0}),
        ("diffusion_process", {"schedule": "log-linear", "rate": float("nan")}),
        ("diffusion_process", {"schedule": "log-linear", "rate": "5"}),
        ("denoiser_sizes", {"layers": 10**9}),
        ("denoiser_sizes", {"hidden": 10**9, "heads": 1}),
    ],
)
def test_from_pretrained_a_config_of_another_shape_is_refused(inverter, tmp_path, key, value):
    inverter.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config[key] = {**config[key], **value} if key == "denoiser_sizes" else value
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"config\.json"):
        Inverter.from_pretrained(tmp_path)


def test_from_pretrained_a_config_that_is_a_list_is_refused(inverter, tmp_path):
    inverter.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        Inverter.from_pretrained(tmp_path)


def test_the_path_of_a_file_is_not_asked_for_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "best").write_bytes(b"")
    monkeypatch.setattr(Inverter, "_from_pretrained", lambda **options: pytest.fail("asked"))
    with pytest.raises(CheckpointError, match="found the file runs/best"):
        Inverter.from_pretrained("runs/best")


def damage_tokenizer(folder):
    (folder / "tokenizer.json").write_text("{}")


@pytest.mark.parametrize(
    "damage",
    [
        damage_truncate,
        damage_missing_weights,
        damage_config,
        damage_config_key,
        damage_format,
        damage_sizes,
        damage_tokenizer,
    ],
)
def test_from_pretrained_damaged_folders_are_refused(inverter, tmp_path, damage):
    inverter.save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(CheckpointError):
        Inverter.from_pretrained(tmp_path)


def test_from_pretrained_an_empty_folder_and_an_unknown_name_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for where in (tmp_path, "no-such-inverter", "nobody/no-such-inverter", "a/b/c"):
        with pytest.raises(CheckpointError, match=r"inverter"):
            Inverter.from_pretrained(where)


def test_push_to_hub_it_pushes_to_the_hub_through_the_mixin(inverter, monkeypatch):
    """What would be uploaded, with the network calls replaced."""
    sent = {}

    class Api:
        def __init__(self, **kwargs):
            pass

        def create_repo(self, repo_id, **kwargs):
            return type("Url", (), {"repo_id": repo_id})()

        def upload_folder(self, folder_path, **kwargs):
            sent["files"] = sorted(path.name for path in folder_path.iterdir())
            return "commit"

    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", Api)
    assert inverter.push_to_hub("somebody/inverter") == "commit"
    assert sent["files"] == ["README.md", "config.json", "model.safetensors", "tokenizer.json"]


def test_the_shipped_inverter_loads():
    assert "minilm" in shipped_inverters()
    inverter = Inverter.from_pretrained()
    assert inverter.encoder.dimension == 384
    assert inverter.length == 32


class Elsewhere(FakeEncoder):
    """Claims to be the fake encoder and embeds elsewhere."""

    def encode(self, texts, progress=None):
        return super().encode(texts, progress)[:, ::-1]


def test_make_fingerprint_a_fingerprint_is_saved_and_another_encoder_refused(inverter, tmp_path):
    encoder = FakeEncoder()
    inverter.require_encoder(Elsewhere())  # it knows none: the digest has to do
    inverter.fingerprint = make_fingerprint(encoder)
    try:
        inverter.save_pretrained(tmp_path)
    finally:
        inverter.fingerprint = None
    loaded = Inverter.from_pretrained(tmp_path)
    loaded.require_encoder(encoder)
    loaded.require_encoder(encoder)
    with pytest.raises(EncoderError, match="cosine of only"):
        loaded.require_encoder(Elsewhere())
    with pytest.raises(EncoderError, match="expected vectors of the encoder fake"):
        loaded.require_encoder(FakeEncoder(dimension=16))


@pytest.mark.parametrize("options", [{"device": "cpu"}, {"dtype": "int3", "revision": "x"}])
def test_from_pretrained_refuses_options_that_nothing_would_come_of(options):
    with pytest.raises(CheckpointError, match=r"options of align, cache_dir, .*; found d"):
        Inverter.from_pretrained("minilm", **options)


def test_aligned_refuses_what_is_no_alignment(inverter):
    with pytest.raises(CheckpointError, match="a map, or its folder; found int"):
        inverter.aligned(5)


@pytest.mark.parametrize("value", [(x for x in [1.0]), {1.0}, Path("v.npy"), io.StringIO()])
def test_invert_refuses_what_is_no_array(inverter, value):
    with pytest.raises(EmbeddingError, match="which is no array"):
        inverter.invert(value)


def test_invert_refuses_a_tensor_without_data(inverter):
    with pytest.raises(EmbeddingError, match="found Cannot copy out of meta tensor"):
        inverter.invert(torch.empty(2, inverter.encoder.dimension, device="meta"))


def test_save_pretrained_refuses_a_storage_that_is_none(inverter, tmp_path):
    other = copy.copy(inverter)
    other.storage = "int4"
    with pytest.raises(CheckpointError, match="storage as a Storage; found 'int4'"):
        other.save_pretrained(tmp_path / "x")


def test_save_pretrained_refuses_a_file_in_the_place_of_the_folder(inverter, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError):
        inverter.save_pretrained(tmp_path / "file")


@pytest.mark.parametrize(
    ("place", "options", "message"),
    [
        ("", {}, "a path; found str ''"),
        ("a\0b", {}, "null byte"),
        ("n" * 300, {}, "name too long"),
        ("there", {"push_to_hub": "no"}, "push_to_hub as True or False; found 'no'"),
        ("there", {"storage": "int8"}, "push_to_hub=True; found storage without it"),
    ],
)
def test_save_pretrained_refuses_places_and_options(inverter, tmp_path, place, options, message):
    with pytest.raises(UnembedError, match=message):
        inverter.save_pretrained(str(tmp_path / place) if place else "", **options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("strategy", ["greedy", None, Decoding])
def test_decoding_refuses_what_is_no_strategy(strategy):
    with pytest.raises(ConfigError, match=r"a strategy; found .* Make one with Decoding.of"):
        Decoding(strategy)
