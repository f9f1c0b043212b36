// Vectors that people bring: JSON or .npy, read in the browser and checked before they are sent.

/** A file or text that holds no usable vector; the message says what to do. */
export class BadVector extends Error {}

/**
 * Vectors of a pasted text: [D], [N, D], an object with "embedding", or the answer of an embedding
 * API ({"data": [{"embedding": …}]}); also plain numbers between commas or spaces.
 * Returns { rows, dimension, read(i) }.
 */
export function fromText(text) {
  const table = matrix(unwrap(parse(text)));
  return { rows: table.length, dimension: table[0].length, read: async (i) => table[i] };
}

function parse(text) {
  if (!text.trim()) throw new BadVector("Paste a vector, or choose a file.");
  try {
    return JSON.parse(text);
  } catch {
    const words = text.replace(/[[\],;]/g, " ").trim().split(/\s+/);
    return words.map((word, i) => {
      if (/^[+-]?(nan|inf(inity)?)$/i.test(word)) return NaN;
      const value = Number(word.replace("−", "-"));
      if (Number.isNaN(value)) {
        throw new BadVector(`Not numeric: “${word.slice(0, 24)}” at position ${i}. Expected numbers only.`);
      }
      return value;
    });
  }
}

function unwrap(value) {
  if (Array.isArray(value?.data)) return value.data.map((item) => item?.embedding ?? item);
  if (Array.isArray(value?.embeddings)) return value.embeddings;
  if (Array.isArray(value?.embedding)) return value.embedding;
  return value;
}

function matrix(value) {
  if (!Array.isArray(value) || !value.length) {
    throw new BadVector("Expected a list of numbers, such as [0.03, -0.05, …].");
  }
  const table = Array.isArray(value[0]) ? value : [value];
  for (const row of table) {
    if (!Array.isArray(row) || row.length !== table[0].length) {
      throw new BadVector("The rows have different lengths. Expected one vector, or N of the same size.");
    }
    const bad = row.findIndex((item) => typeof item !== "number");
    if (bad >= 0) {
      const shown = JSON.stringify(row[bad])?.slice(0, 24);
      throw new BadVector(`Not numeric: ${shown} at position ${bad}. Expected numbers only.`);
    }
  }
  return table;
}

const SIZES = { f2: 2, f4: 4, f8: 8 };

/** The vectors of a .npy file (format 1 to 3), read a row at a time, so that its size is no matter. */
export async function fromNpy(file) {
  const start = new DataView(await file.slice(0, 12).arrayBuffer());
  if (start.byteLength < 12 || start.getUint32(0) !== 0x934e554d || start.getUint16(4) !== 0x5059) {
    throw new BadVector(`${file.name} is not a .npy file. Save one with numpy.save("vectors.npy", vectors).`);
  }
  const wide = start.getUint8(6) > 1;
  const begin = wide ? 12 : 10;
  const length = wide ? start.getUint32(8, true) : start.getUint16(8, true);
  const header = await file.slice(begin, begin + length).text();
  return table(file, begin + length, describe(header));
}

function describe(header) {
  const descr = /'descr':\s*'([^']*)'/.exec(header)?.[1];
  const shape = /'shape':\s*\(([^)]*)\)/.exec(header)?.[1];
  const size = SIZES[descr?.slice(1)];
  if (!size || shape === undefined) {
    throw new BadVector(
      `Expected floating-point numbers (float16, float32 or float64), found dtype ${descr ?? "unknown"}. ` +
        "Convert them: vectors.astype(numpy.float32).",
    );
  }
  const sides = shape.split(",").filter((side) => side.trim()).map(Number);
  if (sides.length < 1 || sides.length > 2 || sides.some((side) => !(side > 0))) {
    throw new BadVector(`Expected the shape [D] or [N, D], found [${sides.join(", ")}].`);
  }
  if (/'fortran_order':\s*True/.test(header) && Math.min(...sides) > 1 && sides.length > 1) {
    throw new BadVector("The array is stored column by column. Save numpy.ascontiguousarray(vectors).");
  }
  const [rows, dimension] = sides.length === 1 ? [1, sides[0]] : sides;
  return { rows, dimension, size, little: descr[0] !== ">" };
}

function table(file, offset, { rows, dimension, size, little }) {
  const bytes = dimension * size;
  if (file.size < offset + rows * bytes) {
    throw new BadVector(`${file.name} ends early: ${rows} × ${dimension} numbers were announced. Copy it again.`);
  }
  const get = { 2: half, 4: (v, at) => v.getFloat32(at, little), 8: (v, at) => v.getFloat64(at, little) }[size];
  const read = async (i) => {
    const from = offset + i * bytes;
    const view = new DataView(await file.slice(from, from + bytes).arrayBuffer());
    return Array.from({ length: dimension }, (_, j) => get(view, j * size, little));
  };
  return { rows, dimension, read };
}

/** A float16 (DataView.getFloat16 is too new for many browsers). */
function half(view, at, little) {
  const bits = view.getUint16(at, little);
  const [sign, exponent, fraction] = [bits >> 15 ? -1 : 1, (bits >> 10) & 31, bits & 1023];
  if (exponent === 31) return fraction ? NaN : sign * Infinity;
  return sign * (exponent ? 2 ** (exponent - 15) * (1 + fraction / 1024) : 2 ** -24 * fraction);
}

/** Refuse a vector that cannot be inverted; returns its length (Euclidean norm). */
export function check(vector, dimension, encoder) {
  if (vector.length !== dimension) {
    throw new BadVector(
      `Wrong size: this vector has ${vector.length} numbers, ${encoder} makes ${dimension}. ` +
        "Use a vector of that encoder, or serve a model for yours.",
    );
  }
  const bad = vector.findIndex((value) => !Number.isFinite(value));
  if (bad >= 0) throw new BadVector(`NaN or infinity at position ${bad}. Leave this vector out.`);
  const norm = Math.hypot(...vector);
  if (norm === 0) throw new BadVector("All numbers are zero: this vector holds no text.");
  return norm;
}
