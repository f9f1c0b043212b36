"""Each defence does what it says; it is parsed, saved and loaded; secrets are the owner's alone."""

import copy
import json
import pickle
import sys
from dataclasses import dataclass

import numpy as np
import pytest

from tests.defences.conftest import like_an_encoder
from unembed.defences.attackers import mean_cosine
from unembed.defences.cut import Cut
from unembed.defences.defence import (
    ALL,
    SHIPPED,
    Defence,
    load_defence,
    parse_defence,
    parse_defences,
)
from unembed.defences.mean import MeanRemoval
from unembed.defences.noise import Gaussian, Laplace
from unembed.defences.pii import (
    Finding,
    ReplacePii,
    presidio_replacer,
    replace_findings,
    replace_spans,
)
from unembed.defences.product import ProductQuantisation
from unembed.defences.quantise import Binary, Int8
from unembed.defences.rotate import Permutation, Rotation
from unembed.errors import ConfigError, DataError, UnembedError

RANDOM = np.random.default_rng


def applied(defence, vectors, seed=0):
    defence.fit(vectors, RANDOM(seed))
    return defence.apply(vectors, RANDOM(seed + 1))


@pytest.mark.parametrize("kind", [Gaussian, Laplace])
@pytest.mark.parametrize("cosine", [0.98, 0.9, 0.6])
@pytest.mark.parametrize("dimension", [128, 1024])
def test_sigma_leaves_the_cosine_it_was_set_to(kind, cosine, dimension):
    vectors = like_an_encoder(200, dimension)
    stored = applied(kind(cosine=cosine), vectors)
    assert mean_cosine(vectors, stored) == pytest.approx(cosine, abs=0.02)
    assert np.linalg.norm(stored, axis=1) == pytest.approx(1.0, abs=1e-5)


def test_laplace_has_heavier_tails_than_gaussian(vectors):
    def kurtosis(kind):
        noise = applied(kind(cosine=0.5), np.zeros_like(vectors))
        return float((noise**4).mean() / (noise**2).mean() ** 2)

    assert kurtosis(Laplace) > kurtosis(Gaussian) + 1


@pytest.mark.parametrize("kind", [Rotation, Permutation])
def test_apply_of_a_secret_order_keeps_every_ranking(kind, vectors):
    defence = kind()
    stored, queries = applied(defence, vectors), like_an_encoder(30, seed=1)
    before, after = queries @ vectors.T, defence.query(queries) @ stored.T
    assert np.allclose(before, after, atol=2e-6)
    assert (before.argmax(axis=1) == after.argmax(axis=1)).all()
    assert abs(mean_cosine(vectors, stored)) < 0.5
    assert defence.invert(stored) is None


def test_fit_of_a_rotation_that_keeps_half_has_half_the_numbers(vectors):
    rotation = Rotation(keep=0.5)
    stored = applied(rotation, vectors)
    assert stored.shape == (400, 24)
    assert np.allclose(rotation.matrix.T @ rotation.matrix, np.eye(24), atol=1e-5)


def test_int8_rounds_to_half_a_step(vectors):
    int8 = Int8()
    stored = applied(int8, vectors)
    assert (np.abs(stored - vectors) <= int8.scale / 2 + 1e-6).all()
    assert mean_cosine(stored, vectors) > 0.9999
    assert int8.codes(stored).dtype == np.int8
    assert int8.bytes_each(48) == 48


def test_binary_products_rank_as_hamming_distances(vectors):
    binary = Binary()
    stored, bits = applied(binary, vectors), vectors > 0
    distance = (bits[0] != bits).sum(axis=1)
    assert np.allclose(stored @ stored[0], 1 - 2 * distance / 48, atol=1e-5)
    assert binary.bytes_each(48) == 6


def test_codes_of_product_quantisation_are_the_nearest_centroids(vectors):
    pq = ProductQuantisation(parts=8)
    stored = applied(pq, vectors)
    codes = pq.codes(vectors)
    assert codes.shape == (400, 8) and codes.dtype == np.uint8
    part, table = vectors[7, 6:12], pq.centroids[1]
    assert codes[7, 1] == np.square(table - part).sum(axis=1).argmin()
    assert (pq.codes(stored) == codes).all()
    assert 0.8 < mean_cosine(stored, vectors) < 0.9999
    assert pq.bytes_each(48) == 8


def test_product_quantisation_refuses_parts_that_do_not_divide(vectors):
    with pytest.raises(ConfigError, match="parts of pq that divide 48; found 7"):
        applied(ProductQuantisation(parts=7), vectors)


def test_cut_keeps_more_by_principal_directions_than_by_the_leading_numbers(vectors):
    kept = {}
    for method in ("pca", "matryoshka"):
        cut = Cut(keep=0.5, method=method)
        stored = applied(cut, vectors)
        assert stored.shape == (400, 24)
        kept[method] = mean_cosine(cut.invert(stored), vectors)
    assert kept["pca"] > kept["matryoshka"] + 0.05


def test_invert_of_mean_removal_is_exact(vectors):
    mean = MeanRemoval()
    stored = applied(mean, vectors)
    assert mean_cosine(stored, vectors) < 0.996
    assert np.allclose(mean.invert(stored), vectors, atol=1e-5)


def test_replace_spans_leaves_no_name_and_no_number():
    text = "Yesterday Maria Braun paid 250 to anna@example.org, see www.example.org/x."
    changed = replace_spans(text)
    assert changed == "Yesterday <NAME> <NAME> paid <NUMBER> to <EMAIL>, see <URL>."
    assert ReplacePii().rewrite(["nothing here"]) == ["nothing here"]


def test_replace_findings_takes_the_surest_of_those_that_overlap():
    text = "Write to anna@example.org or Maria Braun."
    findings = [
        Finding(14, 25, "URL", 0.5),
        Finding(9, 25, "EMAIL_ADDRESS", 1.0),
        Finding(29, 34, "PERSON", 0.85),
        Finding(29, 40, "PERSON", 0.85),
    ]
    assert replace_findings(text, findings) == "Write to <EMAIL_ADDRESS> or <PERSON>."
    assert replace_findings(text, []) == text


def test_rewrite_says_that_presidio_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "presidio_analyzer", None)
    with pytest.raises(ConfigError, match="extra pii for pii:finder=presidio"):
        parse_defence("pii:finder=presidio").rewrite(["a text"])


# Presidio is large and no dependency: where it is installed, it is tried without a download.


def test_presidio_replacer_finds_what_has_a_form_and_what_the_model_names(tmp_path):
    pytest.importorskip("presidio_analyzer")
    import spacy

    model = spacy.blank("en")
    model.add_pipe("entity_ruler").add_patterns([{"label": "PERSON", "pattern": "Maria Braun"}])
    model.to_disk(tmp_path / "model")
    replace = presidio_replacer(str(tmp_path / "model"))
    text = "Maria Braun, anna@example.org, card 4111111111111111."
    assert replace(text) == "<PERSON>, <EMAIL_ADDRESS>, card <CREDIT_CARD>."
    with pytest.raises(ConfigError, match=r"the spaCy model none_such .* is not installed"):
        presidio_replacer("none_such")


# Names


@pytest.mark.parametrize("text", [*ALL, "cut:keep=0.3:method=matryoshka"])
def test_parse_defence_reads_what_str_writes(text):
    assert str(parse_defence(text)) == text


def test_every_shipped_defence_is_among_all():
    assert {str(d).split(":")[0] for d in parse_defences("all")} == set(SHIPPED)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("armour", "a defence (none, gaussian"),
        ("gaussian:sigma=0.1", "a setting of gaussian (cosine); found 'sigma'"),
        ("gaussian:cosine=high", "cosine of gaussian as float; found 'high'"),
        ("gaussian:cosine=1.2", "cosine above 0, up to 1; found 1.2"),
        ("pii:finder=luck", "finder of pii: forms or presidio; found 'luck'"),
        ("cut:method=svd", "method of cut: pca or matryoshka; found 'svd'"),
        ("no_such_module:Mine", "ModuleNotFoundError"),
        ("json:loads", "a class 'loads' in json that derives from unembed.Defence"),
    ],
)
def test_parse_defence_says_what_is_wrong(text, message):
    with pytest.raises(ConfigError) as caught:
        parse_defence(text)
    assert message in str(caught.value)


def test_parse_defences_puts_none_first_and_refuses_the_same_twice():
    assert [str(d) for d in parse_defences("int8,rotation")] == ["none", "int8", "rotation"]
    with pytest.raises(ConfigError, match="int8 twice"):
        parse_defences("int8,all")


# On the disk


@pytest.mark.parametrize("text", ["rotation", "permutation", "int8", "pq:parts=8", "cut", "mean"])
def test_load_defence_gives_what_save_wrote(text, vectors, tmp_path):
    defence = parse_defence(text)
    applied(defence, vectors)
    defence.save(tmp_path / "copy.parquet")
    again = load_defence(tmp_path / "copy.parquet")
    queries = like_an_encoder(5, seed=2)
    assert np.array_equal(again.query(queries), defence.query(queries))


def test_save_writes_secrets_apart_for_the_owner_alone(vectors, tmp_path):
    rotation = Rotation()
    applied(rotation, vectors)
    settings, secret = rotation.save(tmp_path / "copy.parquet")
    assert secret.stat().st_mode & 0o777 == 0o600
    assert json.loads(settings.read_text())["defence"] == "rotation"
    assert [p.name for p in tmp_path.glob("*.defence.safetensors")] == []
    secret.unlink()
    with pytest.raises(DataError, match="matrix of rotation; found no file that has them"):
        load_defence(tmp_path / "copy.parquet")


def test_load_defence_refuses_a_folder_without_one(tmp_path):
    with pytest.raises(DataError, match=r"expected a defended copy's \.defence\.json"):
        load_defence(tmp_path / "copy.parquet")


def test_load_defence_runs_no_code_that_a_file_names(tmp_path):
    (tmp_path / "mine.py").write_text("raise SystemExit('run')")
    settings = tmp_path / "copy.parquet.defence.json"
    settings.write_text(json.dumps({"defence": f"{tmp_path}/mine.py:Mine"}))
    with pytest.raises(ConfigError, match="Pass its class to load_defence"):
        load_defence(tmp_path / "copy.parquet")
    settings.write_text('{"defence": 3}')
    with pytest.raises(DataError, match=r"a defended copy's \.defence\.json"):
        load_defence(tmp_path / "copy.parquet")


def test_load_defence_takes_a_class_of_the_users_own(vectors, tmp_path):
    @dataclass
    class Scaled(Defence):
        factor: float = 1.0

        def apply(self, vectors, random):
            return self.factor * vectors

    Scaled(factor=0.5).save(tmp_path / "copy.parquet")
    again = load_defence(tmp_path / "copy.parquet", Scaled)
    assert np.array_equal(again.query(vectors), 0.5 * vectors)


def test_a_defence_needs_apply_alone(vectors):
    class Negative(Defence):
        def apply(self, vectors, random):
            return -vectors

    negative = Negative()
    assert str(negative) == "Negative"
    assert np.array_equal(negative.query(vectors), -vectors)
    assert negative.bytes_each(48) == 192


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Gaussian(cosine="0.9"), "cosine above 0, up to 1; found '0.9'"),
        (lambda: Gaussian(cosine=None), "cosine above 0"),
        (lambda: Cut(keep=True), "keep above 0"),
        (lambda: Cut(method=3), "method of cut: pca or matryoshka; found 3"),
        (lambda: ProductQuantisation(parts=1.5), "parts as a whole number"),
        (lambda: ProductQuantisation(parts="8"), "parts as a whole number"),
        (lambda: Binary(rerank=None), "rerank as a whole number"),
        (lambda: ReplacePii(finder=3), "finder of pii: .*found 3"),
        (lambda: replace_spans(None), "a text; found NoneType"),
        (lambda: parse_defence(None), "the name of a defence, with its settings; found NoneType"),
        (lambda: parse_defences(["int8"]), "the name of a defence"),
        (lambda: load_defence(None), "a path; found NoneType"),
        (lambda: Int8().save("nowhere"), "int8 fitted to vectors; found no scale. Call fit"),
        (lambda: Rotation().apply(np.ones((1, 4)), None), "rotation fitted to vectors"),
    ],
)
def test_defence_says_what_is_of_another_kind_or_not_fitted(make, message):
    with pytest.raises(UnembedError, match=message):
        make()


def test_defence_not_fitted_has_no_other_attributes_and_can_be_copied():
    defence = Rotation()
    assert not hasattr(defence, "nothing")
    assert copy.deepcopy(defence) == pickle.loads(pickle.dumps(defence)) == defence
    assert str(Cut(keep=np.float32(0.25))) == "cut:keep=0.25"


@dataclass
class Odd(Defence):
    """Settings of every kind, one without a default."""

    amount: float
    whole: int | None = None
    switch: bool = True

    def apply(self, vectors, random):
        """The same vectors."""
        return vectors


@pytest.mark.parametrize(
    "defence", [Odd(2.0), Odd(0.5, 3, False), Odd(1, None, True), Odd("much", 7)]
)
def test_load_defence_gives_a_users_settings_of_every_kind(defence, tmp_path):
    defence.save(str(tmp_path / "copy"))
    assert load_defence(tmp_path / "copy", Odd) == defence


def test_load_defence_refuses_another_format(tmp_path):
    (tmp_path / "copy.defence.json").write_text('{"format": 99, "defence": "int8"}')
    with pytest.raises(DataError, match="format 99, of another version"):
        load_defence(tmp_path / "copy")
