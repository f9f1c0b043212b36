import pytest

from unembed.config import load_config, shipped_configs
from unembed.encoders.pipeline import CATALOG, find, licence_lines, licence_note


@pytest.mark.parametrize("entry", CATALOG.values(), ids=lambda entry: entry.name)
def test_an_entry_is_found_by_name_and_repository_in_any_case(entry):
    for name in (entry.name, entry.repository):
        for spelling in (name, name.lower(), name.upper()):
            assert find(spelling) is entry


@pytest.mark.parametrize("name", ["", "all-MiniLM", "sentence-transformers", "fake"])
def test_what_is_not_there_is_not_found(name):
    assert find(name) is None


def test_weights_that_come_from_a_package_index_are_checked():
    assert all(entry.weights_sha256 for entry in CATALOG.values() if entry.package)


@pytest.mark.parametrize("name", shipped_configs())
def test_shipped_configs_every_shipped_configuration_names_an_encoder_we_know(name):
    assert find(load_config(name).encoder.name) is not None


@pytest.mark.parametrize(
    ("name", "lines", "said"),
    [
        ("all-MiniLM-L6-v2", "license: apache-2.0", "is Apache-2.0"),
        ("jina-embeddings-v3", "license: cc-by-nc-4.0", "is CC-BY-NC-4.0"),
        ("EmbeddingGemma-300m", "license: gemma", "is Gemma"),
        ("fake", "license: other\nlicense_name: see-the-encoder", "is not known here"),
    ],
)
def test_licence_lines_are_those_of_the_encoders_words(name, lines, said):
    assert licence_lines(name) == lines
    assert said in licence_note(name)
