"""Vectors that people bring: pasted, chosen or dropped, and what is said about those of no use."""

import io
import json
import re

import numpy as np
import pytest
from playwright.sync_api import expect

from tests.evaluation.test_leaked import UNSEEN, unseen, write
from unembed.evaluation.leaked import LeakedPairs, align_pairs
from unembed.inverter import Inverter

from . import serving

READ = """async ([bytes, row]) => {
    const { fromNpy } = await import("/static/vector.js");
    return (await fromNpy(new File([new Uint8Array(bytes)], "v.npy"))).read(row);
}"""


@pytest.fixture
def page(server, open_page):
    page = open_page(server.address)
    page.get_by_text("Your own vector").click()
    return page


@pytest.fixture(scope="module")
def vectors(encoder):
    return encoder.encode(["the cat sleeps.", "a doctor reads the old code."])


def npy(array, version=None):
    file = io.BytesIO()
    np.lib.format.write_array(file, array, version=version)
    return file.getvalue()


def drop(page, name, content):
    files = page.evaluate_handle(
        """([name, bytes]) => {
            const files = new DataTransfer();
            files.items.add(new File([new Uint8Array(bytes)], name));
            return files;
        }""",
        [name, list(content)],
    )
    page.locator("#drop").dispatch_event("drop", {"dataTransfer": files})


def invert(page):
    """Returns the vector that was sent."""
    with page.expect_request("**/decode") as sent:
        page.get_by_role("button", name="Invert", exact=True).click()
    expect(page.locator(".lane[data-state=done]")).to_be_visible()
    return sent.value.post_data_json["embedding"]


def test_the_page_says_what_it_expects(page):
    expect(page.locator("#expected")).to_have_text(
        "This model reads vectors of fake: 32 numbers each."
    )


def test_a_pasted_vector_comes_back(page, vectors):
    page.locator("#vector").fill(json.dumps(vectors[0].tolist()))
    expect(page.locator("#vector-note")).to_have_text("32 numbers")
    assert invert(page) == pytest.approx(vectors[0].tolist())
    expect(page.locator(".verdict")).to_have_text("Recovered from 32 numbers.")
    assert page.locator(".words .recovered").count() > 0
    assert page.locator(".words .original").count() == 0
    assert page.locator(".figures dd").first.inner_text() == "–"


@pytest.mark.parametrize(
    "shape",
    [
        lambda v: {"embedding": v},
        lambda v: {"data": [{"embedding": v}], "model": "any"},
        lambda v: [v],
    ],
)
def test_the_answers_of_embedding_apis_can_be_pasted(shape, page, vectors):
    page.locator("#vector").fill(json.dumps(shape(vectors[1].tolist())))
    assert invert(page) == pytest.approx(vectors[1].tolist())


def test_plain_numbers_can_be_pasted(page, vectors):
    page.locator("#vector").fill(" ".join(str(3 * x) for x in vectors[0]))
    assert invert(page) == pytest.approx((3 * vectors[0]).tolist())
    expect(page.locator("#vector-note")).to_have_text("32 numbers, length 3.00, scaled to 1")


def test_a_npy_file_is_dropped(page, vectors):
    drop(page, "one.npy", npy(vectors[0]))
    expect(page.locator("#vector-note")).to_have_text("one.npy: 32 numbers, unit length")
    assert invert(page) == vectors[0].tolist()


def test_every_kind_of_npy_file_is_read_exactly(page):
    tiny_and_large = [6e-8, -6e-5, 6.1e-5, 1.0, -65504.0, 0.1, 0.0, -0.0]
    for version in ((1, 0), (2, 0), (3, 0)):
        for dtype in ("<f2", "<f4", "<f8", ">f4"):
            array = np.array([tiny_and_large, tiny_and_large[::-1]], dtype)
            read = page.evaluate(READ, [list(npy(array, version)), 1])
            assert read == array[1].astype(float).tolist(), (version, dtype)


def test_a_row_of_many_is_picked(page, vectors):
    drop(page, "many.npy", npy(vectors))
    expect(page.locator("#vector-note")).to_contain_text("many.npy: 2 × 32 numbers")
    page.get_by_label("Row").fill("1")
    page.get_by_label("Row").press("Tab")
    assert invert(page) == pytest.approx(vectors[1].tolist())
    page.get_by_label("Row").fill("2")
    page.get_by_role("button", name="Invert", exact=True).click()
    expect(page.locator("#vector-error")).to_have_text("Choose a row from 0 to 1.")


def test_a_file_is_chosen_and_dropping_one_on_the_sentence_opens_the_form(
    server, open_page, vectors
):
    page = open_page(server.address)
    drop(page, "one.npy", npy(vectors[0]))
    expect(page.locator("#vector")).to_be_visible()
    text = json.dumps(vectors[1].tolist()).encode()
    page.locator("#file").set_input_files({"name": "v.json", "mimeType": "", "buffer": text})
    assert invert(page) == pytest.approx(vectors[1].tolist())


def test_wrong_vectors_are_refused_in_words(page):
    for text, message in {
        "": "Paste a vector",
        "[1, 2, 3]": "Wrong size: this vector has 3 numbers, fake makes 32",
        f"[{'0, ' * 31}0]": "All numbers are zero",
        f"[{'1, ' * 31}NaN]": "NaN or infinity at position 31",
        f"{'1 ' * 31} -inf": "NaN or infinity at position 31",
        f"[{'1, ' * 31}1e999]": "NaN or infinity at position 31",
        "[1, two, 3]": "Not numeric: “two” at position 1",
        '[1, "2", 3]': 'Not numeric: "2" at position 1',
        "[1, null]": "Not numeric: null at position 1",
        "[[1, 2], [3]]": "The rows have different lengths",
        '{"vector": 1}': "Expected a list of numbers",
        "[]": "Expected a list of numbers",
    }.items():
        page.locator("#vector").fill(text)
        expect(page.locator("#vector-error")).to_be_hidden()
        page.get_by_role("button", name="Invert", exact=True).click()
        expect(page.locator("#vector-error")).to_contain_text(message)
    assert page.locator(".lane[data-state]").count() == 0  # nothing was asked of the server


def test_wrong_files_are_refused_in_words(page):
    for content, message in (
        (b"PK\x03\x04 a zip", "is not a .npy file"),
        (npy(np.arange(32)), "found dtype <i8"),
        (npy(np.array(["a"] * 32)), "found dtype <U1"),
        (npy(np.ones((2, 2, 8), "f4")), "found [2, 2, 8]"),
        (npy(np.ones((0, 32), "f4")), "found [0, 32]"),
        (npy(np.asfortranarray(np.ones((2, 32), "f4"))), "column by column"),
        (npy(np.ones(32, "f4"))[:-4], "ends early"),
        (npy(np.ones(31, "f4")), "Wrong size"),
        (npy(np.full(32, np.nan, "f4")), "NaN or infinity at position 0"),
        (npy(np.zeros(32, "f2")), "All numbers are zero"),
    ):
        drop(page, "bad.npy", content)
        expect(page.locator("#vector-error")).to_contain_text(message)
        page.get_by_role("button", name="Invert", exact=True).click()
        expect(page.locator("#vector-error")).to_contain_text(message)  # it stays


def test_a_refused_vector_gives_way_to_a_good_one(page, vectors):
    drop(page, "bad.npy", b"nothing")
    drop(page, "good.npy", npy(vectors[0]))
    expect(page.locator("#vector-error")).to_be_hidden()
    assert invert(page) == pytest.approx(vectors[0].tolist())


@pytest.mark.slow
def test_a_vector_of_an_unseen_encoder_is_read_through_a_map_chosen_on_the_page(
    chromium, folder, open_page, inverter, encoder, passages, tmp_path
):
    path = write(tmp_path / "leaked.jsonl", passages[:40], unseen(encoder, passages[:40]))
    alignment = align_pairs(inverter, encoder, LeakedPairs(path), name="unseen")
    alignment.save(tmp_path / "my-map")
    vector = unseen(encoder, passages[40:41])[0]
    expected = Inverter.from_pretrained(folder, align=alignment).invert(vector[None])[0].text
    with serving.Server("tests.browser.serving", folder, "--align", tmp_path / "my-map") as mapped:
        page = open_page(mapped.address)
        page.locator("#model").select_option("tiny + my-map")
        expect(page.locator("#expected")).to_have_text(
            re.compile(
                rf"This model reads vectors of unseen: {UNSEEN} numbers each, through a map into "
                r"the space of fake from 40 leaked pairs.*"
            )
        )
        page.locator("#vector").fill(json.dumps(vector.tolist()))
        assert invert(page) == pytest.approx(vector.tolist())
        assert page.locator(".words .recovered").all_inner_texts() == expected.split()
