// One decoding on the page: its chips, its timeline, and how the recovery compares.

import { decode } from "./api.js";
import { make, number, percent, stamp } from "./dom.js";

const FRAME = 130; // milliseconds that a step is shown for at least, so that people can follow
const SURE = 0.6; // confidence from which a chip is marked strongly
const SHOW = 3200; // ... unless the whole would then take longer than this

const SPOKEN = { masked: "masked", guessed: "guessed", settled: "settled", end: "end", padding: "unused" };
const MARKS = { right: "✓", wrong: "≠", missing: "−", extra: "+" };

// Who wants no motion sees the newest step as it comes, and goes through them with the timeline
const still = matchMedia("(prefers-reduced-motion: reduce)");

const pause = (time) => new Promise((resolve) => setTimeout(resolve, time));

export class Lane {
  /** @param length Positions, all of them masked until `run`. */
  constructor(title, length) {
    this.node = stamp("lane-template");
    const part = (selector) => this.node.querySelector(selector);
    this.parts = { chips: part(".chips"), play: part(".play"), range: part("input"), outcome: part(".outcome") };
    part("h2").textContent = title;
    this.node.setAttribute("aria-label", title);
    this.parts.chips.setAttribute("aria-label", `${title}, position by position`);
    this.parts.range.setAttribute("aria-label", `Step of ${title}`);
    this.parts.range.addEventListener("input", () => this.#scrub());
    this.parts.play.addEventListener("click", () => this.#toggle());
    this.#begin(length);
  }

  /**
   * Decode, showing every step as it comes.
   * @param heard Called with each event. Resolves to the `done` data when all of it was shown.
   */
  async run(body, signal, heard) {
    this.#state("waiting");
    this.open = true; // more steps may come
    let playing, result;
    try {
      for await (const { event, data } of decode(body, signal)) {
        heard(event, data);
        if (event === "start") this.#state("running");
        if (event === "start") this.dimension = data.dimension;
        if (event === "step") this.#add(data);
        if (event === "step") playing ??= this.#play(still.matches);
        if (event === "done") result = data;
      }
      this.open = false;
      await playing;
      this.#outcome(result);
      this.#state("done");
      return result;
    } catch (error) {
      this.open = false;
      this.#state("stopped");
      throw error;
    }
  }

  /** How far it came; null before the first step. */
  get progress() {
    const last = this.frames.at(-1);
    return last?.index ? `step ${last.index} of ${last.total}` : null;
  }

  #begin(length) {
    const tokens = Array.from({ length }, () => ({ text: "", confidence: 0, state: "masked" }));
    this.frames = [{ index: 0, total: 0, mask_ratio: 1, milliseconds: 0, tokens }];
    this.parts.chips.replaceChildren(...tokens.map(() => make("li", { className: "chip" })));
    this.show(0);
  }

  #add(frame) {
    this.frames.push(frame);
    this.frames[0].total = frame.total;
    this.parts.range.max = this.frames.length - 1;
    this.parts.range.disabled = this.parts.play.disabled = false;
  }

  /** Go through the steps up to the newest, no faster than eyes can follow; `skip`: to the newest at once. */
  async #play(skip = false) {
    const turn = (this.turn = {}); // another turn, or none, ends this one
    const { play } = this.parts;
    play.textContent = "Pause";
    while (this.turn === turn && (this.open || this.at < this.frames.length - 1)) {
      if (this.at < this.frames.length - 1) this.show(skip ? this.frames.length - 1 : this.at + 1);
      await pause(skip ? 30 : Math.min(FRAME, SHOW / this.frames[this.at].total));
    }
    if (this.turn === turn) this.#halt();
  }

  #halt() {
    this.turn = null;
    this.parts.play.textContent = "Replay";
  }

  #toggle() {
    if (this.turn) return this.#halt();
    if (this.at >= this.frames.length - 1) this.show(0);
    this.#play();
  }

  #scrub() {
    this.#halt();
    this.show(Number(this.parts.range.value));
  }

  #state(name) {
    this.node.dataset.state = name;
  }

  /** Show one step: 0 is the blank start. */
  show(at) {
    this.at = at;
    const frame = this.frames[at];
    const { chips, range } = this.parts;
    frame.tokens.forEach((token, i) => paint(chips.children[i], token, i));
    range.value = at;
    range.setAttribute("aria-valuetext", `step ${frame.index} of ${frame.total}, ${percent(frame.mask_ratio)} masked`);
    if (!frame.total) return; // not begun: nothing to count
    const write = (name, text) => (this.node.querySelector(`.${name}`).textContent = text);
    write("count", `Step ${frame.index} of ${frame.total}`);
    write("ratio", `${percent(frame.mask_ratio)} masked`);
    write("time", `${Math.round(frame.milliseconds)} ms`);
    const calls = frame.encoder_calls ? ` after ${frame.encoder_calls} calls` : "";
    write("near", frame.cosine == null ? "" : `cosine ${number(frame.cosine)}${calls}`);
  }

  #outcome(done) {
    const { outcome } = this.parts;
    const words = done.alignment ?? done.text.split(/\s+/).filter(Boolean).map((recovered) => ({ recovered }));
    outcome.querySelector(".verdict").replaceChildren(...verdict(done, this.dimension));
    outcome.querySelector(".words").replaceChildren(...words.map(word));
    outcome.querySelector(".key").hidden = !done.alignment;
    outcome.querySelector(".figures").replaceChildren(...figures(done));
    outcome.hidden = false;
  }
}

/** A chip: what it says, how sure it is, and the same in words for those who do not see it. */
function paint(chip, token, position) {
  const { text, joined } = clean(token.text);
  const shown = { masked: "", padding: "", end: "end" }[token.state] ?? text;
  const sure = token.state === "masked" || token.state === "padding" ? "" : `, ${percent(token.confidence)}`;
  chip.dataset.state = token.state;
  chip.toggleAttribute("data-joined", joined && shown !== "");
  chip.toggleAttribute("data-changed", Boolean(token.changed) && token.state !== "padding");
  chip.toggleAttribute("data-sure", token.state === "settled" && token.confidence >= SURE);
  chip.style.setProperty("--sure", token.confidence ?? 0);
  chip.title = `Position ${position + 1}: ${SPOKEN[token.state]}${sure}`;
  chip.replaceChildren(shown, make("span", { className: "hidden" }, ` ${SPOKEN[token.state]}${sure}`));
}

/** A vocabulary's spelling as people write it: without the signs for "joins" and "starts a word". */
function clean(text) {
  const joined = text.startsWith("##");
  return { text: joined ? text.slice(2) : text.replace(/^[▁Ġ]/, ""), joined };
}

function verdict(done, dimension) {
  const source = `from ${dimension} numbers`;
  if (!done.alignment) return [make("b", {}, done.text ? "Recovered" : "No text came back"), ` ${source}.`];
  const whole = done.alignment.filter(({ kind }) => kind !== "extra").length;
  const right = done.alignment.filter(({ kind }) => kind === "right").length;
  if (done.exact_match) return [make("b", {}, "Every word came back"), ` ${source}.`];
  return [make("b", {}, `${right} of ${whole} words came back`), ` ${source}.`];
}

function word({ kind, original, recovered }) {
  if (!kind) return make("li", { className: "word" }, make("span", { className: "recovered" }, recovered));
  return make(
    "li",
    { className: "word", "data-kind": kind },
    make("span", { className: "original" }, make("span", { className: "hidden" }, "original "), original || "—"),
    make("span", { className: "recovered" }, make("span", { className: "hidden" }, " recovered "), recovered || "—"),
    make("span", { className: "sign", title: kind }, make("span", { "aria-hidden": "true" }, MARKS[kind]),
      make("span", { className: "hidden" }, ` ${kind}.`)),
  );
}

function figures(done) {
  const share = (value) => (value == null ? "–" : percent(value));
  const rows = [
    ["Token accuracy", share(done.token_accuracy)],
    ["Exact match", done.exact_match == null ? "–" : done.exact_match ? "yes" : "no"],
    ["Token F1", share(done.token_f1)],
    ["Cosine", done.cosine == null ? "–" : number(done.cosine)],
    ["Time", `${Math.round(done.milliseconds)} ms`],
    ["Denoiser passes", String(done.passes)],
    ["Encoder calls", String(done.encoder_calls)],
  ];
  return rows.map(([name, value]) => make("div", {}, make("dt", {}, name), make("dd", {}, value)));
}
