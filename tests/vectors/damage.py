"""Damaged Parquet and Arrow files, read one by one: python -m tests.vectors.damage FOLDER N"""

import io
import json
import random
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from unembed.data.readers import count_texts, read_texts
from unembed.errors import UnembedError
from unembed.evaluation.samples import PassageFile
from unembed.vectors.read import VectorFile, vector_size

D = 8
MAGIC = (b"PAR1", b"ARROW1")  # at the end, the length of the footer before it


def whole():
    """Files of 40 vectors with their texts, by name: what writers of Parquet and Arrow do."""
    numbers = np.random.default_rng(0).standard_normal((40, D)).astype(np.float32)
    lists = pa.array(numbers.tolist(), pa.list_(pa.float32()))
    texts = [f"text number {row}" for row in range(40)]
    table = pa.table({"embedding": lists, "text": texts, "lang": ["en", "de"] * 20})
    fields = pa.array([{"embedding": row, "id": i} for i, row in enumerate(numbers.tolist())])
    fixed = pa.array(numbers.tolist(), pa.list_(pa.float32(), D))
    tables = {
        "plain": (table, {"row_group_size": 13}),
        "index": (table, {"row_group_size": 13, "write_page_index": True}),
        "fixed": (table.set_column(0, "embedding", fixed), {"compression": "zstd"}),
        "struct": (pa.table({"a": fields, "text": texts}), {}),
        "second": (table, {"data_page_version": "2.0", "compression": "gzip"}),
        "codes": (table.set_column(1, "text", pa.array(texts).dictionary_encode()), {}),
        "spelled": (pa.table({"embedding": list(map(str, numbers.tolist())), "text": texts}), {}),
    }
    files = {}
    for name, (content, options) in tables.items():
        buffer = io.BytesIO()
        pq.write_table(content, buffer, **options)
        files[f"{name}.parquet"] = buffer.getvalue()
        buffer = io.BytesIO()
        with pa.ipc.new_file(buffer, content.schema) as writer:
            writer.write_table(content, max_chunksize=13)
        files[f"{name}.arrow"] = buffer.getvalue()
    return files


def damaged(data, draws):
    """Flip or overwrite up to four bytes, most of them in the footer; at times cut the end off."""
    end = len(data) - next(len(magic) for magic in MAGIC if data.endswith(magic)) - 4
    start = end - int.from_bytes(data[end : end + 4], "little")
    data = bytearray(data)
    for _ in range(draws.choice((1, 1, 1, 2, 4))):
        regions = ((start, end), (0, start), (end, len(data)))
        place = draws.randrange(*draws.choices(regions, (8, 3, 1))[0])
        flip = draws.random() < 0.6
        data[place] = data[place] ^ 1 << draws.randrange(8) if flip else draws.choice((0, 127, 255))
    return bytes(data[: draws.randrange(len(data))] if draws.random() < 0.08 else data)


def read_everything(path):
    """Read a file in every way there is: what it gives, or the errors that are ours."""
    ways = [
        lambda: len(VectorFile(path)),
        lambda: list(VectorFile(path, skip_bad=True).chunks(D)),
        lambda: list(VectorFile(path, "a.embedding", skip_bad=True, keep=["text"]).chunks(D)),
        lambda: vector_size(VectorFile(path)),
    ]
    if path.suffix == ".parquet":
        ways += [lambda: list(read_texts(path)), lambda: count_texts(path)]
        ways += [lambda: list(PassageFile(path))]
    results = []
    for way in ways:
        try:
            results.append(way())
        except UnembedError as error:
            results.append(error)
    return results


def main(folder, count, seed=4):
    """Read so many damaged files, and say how many were read and how many were refused."""
    draws, files = random.Random(seed), whole()
    names = sorted(files)
    outcomes = {"answers": 0, "refusals": 0}
    for number in range(count):
        name = names[number % len(names)]
        path = folder / name
        path.write_bytes(damaged(files[name], draws))
        sys.stderr.write(f"{number} {name}\n")
        for result in read_everything(path):
            outcomes["refusals" if isinstance(result, UnembedError) else "answers"] += 1
    sys.stdout.write(json.dumps(outcomes))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
