// The embedding as a picture: one cell for each number, from cold (negative) to warm (positive).

import { number } from "./dom.js";

const NARROWEST = 3; // CSS pixels of a cell, else the strip gets another row

export class Strip {
  constructor(canvas, probe) {
    this.canvas = canvas;
    this.values = null;
    new ResizeObserver(() => this.draw()).observe(canvas.parentElement);
    canvas.addEventListener("pointermove", (event) => this.#tell(event, probe));
    canvas.addEventListener("pointerleave", () => (probe.textContent = ""));
  }

  /** Take on an embedding; returns the largest magnitude, which the scale ends at. */
  show(values) {
    this.values = values;
    this.most = values.reduce((most, value) => Math.max(most, Math.abs(value)), 0);
    const [low, high] = [Math.min(...values), Math.max(...values)];
    this.canvas.setAttribute(
      "aria-label",
      `Heat strip of the ${values.length} numbers of the embedding, from ${number(low)} to ${number(high)}`,
    );
    this.draw();
    return this.most;
  }

  /** Paint for the present width and theme. */
  draw() {
    const { canvas, values } = this;
    const width = canvas.clientWidth;
    if (!values || !width) return;
    this.rows = Math.ceil((values.length * NARROWEST) / width);
    this.columns = Math.ceil(values.length / this.rows);
    canvas.style.setProperty("--rows", this.rows);
    const [scale, height] = [window.devicePixelRatio || 1, canvas.clientHeight];
    canvas.width = Math.round(width * scale);
    canvas.height = Math.round(height * scale);
    const context = canvas.getContext("2d");
    const tall = canvas.height / this.rows;
    const wide = canvas.width / this.columns;
    const edge = (i) => Math.round(i * wide); // whole pixels, so that no seams show
    const style = getComputedStyle(canvas);
    const [warm, cold] = [style.getPropertyValue("--warm"), style.getPropertyValue("--cold")];
    values.forEach((value, i) => {
      const [row, column] = [Math.floor(i / this.columns), i % this.columns];
      context.globalAlpha = Math.min(1, Math.abs(value) / this.most) ** 0.8;
      context.fillStyle = value < 0 ? cold : warm;
      const top = Math.round(row * tall);
      context.fillRect(edge(column), top, edge(column + 1) - edge(column), Math.round(tall - (this.rows > 1)));
    });
  }

  #tell(event, probe) {
    if (!this.values) return;
    const box = this.canvas.getBoundingClientRect();
    const column = Math.floor(((event.clientX - box.left) / box.width) * this.columns);
    const row = Math.floor(((event.clientY - box.top) / box.height) * this.rows);
    const value = this.values[row * this.columns + column];
    if (value !== undefined) probe.textContent = `number ${row * this.columns + column}: ${number(value, 4)}`;
  }
}
