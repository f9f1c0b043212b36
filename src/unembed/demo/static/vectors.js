// The part of the form for people's own vectors: paste, choose or drop, pick a row, check.

import { byId, number, say } from "./dom.js";
import { BadVector, check, fromNpy, fromText } from "./vector.js";

const KEPT = 200_000; // characters, more than the longest vector has
const SHOWN = 5; // significant digits of a row shown in the field

export class Vectors {
  /** @param model The model in use, whose encoder and dimension a vector must fit. */
  constructor(model) {
    this.model = model;
    this.table = null; // of the file chosen; null: what is pasted counts
    this.refused = null; // why the file chosen is of no use, until something else is entered
  }

  /** @param opened Called when a file was dropped, to show this part of the form. */
  wire(opened) {
    byId("file").addEventListener("change", ({ target }) => {
      if (target.files[0]) this.#open(target.files[0]);
      target.value = "";
    });
    byId("vector").addEventListener("input", () => this.#typed());
    byId("row-index").addEventListener("change", () => this.#row());
    document.addEventListener("dragover", (event) => {
      event.preventDefault();
      byId("drop").dataset.over = true;
    });
    for (const name of ["dragleave", "drop"]) {
      document.addEventListener(name, () => delete byId("drop").dataset.over);
    }
    document.addEventListener("drop", (event) => {
      event.preventDefault();
      const [file] = event.dataTransfer.files;
      if (!file) return;
      opened();
      this.#open(file);
    });
  }

  /** { embedding } where the vector is usable; else null, and the field says why. */
  async entered() {
    say(byId("vector-error"), null);
    try {
      if (this.refused) throw this.refused;
      if (!this.table) this.#offer(fromText(byId("vector").value));
      const embedding = await this.table.read(this.#index());
      const { dimension, encoder } = this.model();
      const norm = check(embedding, dimension, encoder);
      const unit = Math.abs(norm - 1) < 0.01 ? "unit length" : `length ${number(norm, 2)}, scaled to 1`;
      byId("vector-note").textContent = `${this.#shape()}, ${unit}`;
      return { embedding };
    } catch (error) {
      return this.#refuse(error);
    }
  }

  /** What a reload should find again. */
  get remembered() {
    const text = byId("vector").value;
    return text.length <= KEPT ? text : "";
  }

  set remembered(text) {
    byId("vector").value = text;
  }

  /** Tell what a pasted vector is once it is whole; what is wrong with it is told on Invert. */
  #typed() {
    this.#offer(null);
    say(byId("vector-error"), null);
    try {
      this.#offer(fromText(byId("vector").value));
    } catch (error) {
      if (!(error instanceof BadVector)) throw error;
    }
  }

  async #open(file) {
    say(byId("vector-error"), null);
    try {
      this.#offer(file.name.endsWith(".npy") ? await fromNpy(file) : fromText(await file.text()), file.name);
      await this.#row();
    } catch (error) {
      this.#offer(null);
      byId("vector").value = "";
      this.#refuse(error);
      this.refused = error;
    }
  }

  #offer(table, name) {
    this.table = table;
    this.refused = null;
    this.name = name;
    byId("pick").hidden = !(table?.rows > 1);
    if (table) byId("row-index").max = table.rows - 1;
    byId("vector-note").textContent = table ? this.#shape() : "";
  }

  #shape() {
    const size = this.table.rows > 1 ? `${this.table.rows} × ${this.table.dimension}` : `${this.table.dimension}`;
    return `${this.name ? `${this.name}: ` : ""}${size} numbers`;
  }

  #index() {
    const index = Number(byId("row-index").value);
    if (this.table.rows === 1) return 0;
    if (Number.isInteger(index) && index >= 0 && index < this.table.rows) return index;
    throw new BadVector(`Choose a row from 0 to ${this.table.rows - 1}.`);
  }

  /** Put the row of the file in the field and check it, so that people see at once. */
  async #row() {
    if (!this.table) return;
    try {
      const values = await this.table.read(this.#index());
      byId("vector").value = `[${values.map((value) => Number(value.toPrecision(SHOWN))).join(", ")}]`;
      await this.entered();
    } catch (error) {
      this.#refuse(error);
    }
  }

  #refuse(error) {
    if (!(error instanceof BadVector)) throw error;
    say(byId("vector-error"), error.message);
    byId("vector-note").textContent = "";
    return null;
  }
}
