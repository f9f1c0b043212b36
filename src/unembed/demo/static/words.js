// The words that a vector says are in its text: what it gives away of one too long to be written out.

import { Lost, Refused, words } from "./api.js";
import { byId, make, percent } from "./dom.js";

const TOP = 40;
const MEANING = "Of the words given 30 %, three in ten are in the text. For texts of about 32 to 256 tokens.";

export class Words {
  /** Nothing is asked, nothing is shown. */
  hide() {
    this.turn = null; // what is still to come is of no interest
    byId("words").hidden = true;
    byId("bars").replaceChildren();
  }

  /** Ask for the words of { text } or { embedding } and draw them; what goes wrong is told in the panel. */
  async show({ text, embedding, model }, signal) {
    this.hide();
    const turn = (this.turn = {});
    byId("words-note").textContent = "Reading the words…";
    // Of a text that is too long they say more than what comes back; a vector's may be short
    if (text) byId("lanes").before(byId("words"));
    else byId("legend").after(byId("words"));
    byId("words").hidden = false;
    try {
      const answer = await words({ text, embedding, model, top: TOP }, signal);
      if (this.turn === turn) this.#draw(answer.words);
    } catch (error) {
      if (this.turn !== turn) return;
      if (error.name === "AbortError") return this.hide();
      if (!(error instanceof Refused || error instanceof Lost)) throw error;
      byId("words-note").textContent = error.message;
    }
  }

  #draw(found) {
    const known = found.some(({ occurs }) => occurs !== null);
    const right = found.filter(({ occurs }) => occurs).length;
    const count = known ? `${right} of these ${found.length} are in your text (✓). ` : "";
    byId("words-note").textContent = `${count}${MEANING}`;
    byId("bars").replaceChildren(...found.map(bar));
  }
}

/** A word over a bar of its probability. */
function bar({ word, probability, base_rate: usual, is_name: name, occurs }) {
  const sign = make("span", { className: "sign" }, make("span", { "aria-hidden": "true" }, "✓"),
    make("span", { className: "hidden" }, " in your text,"));
  const node = make("li", { className: "bar", title: `${percent(probability)}; ${percent(usual)} of all texts have it` },
    make("span", { className: name ? "name" : "" }, word), occurs ? sign : "",
    make("span", { className: "share" }, percent(probability)));
  node.style.setProperty("--sure", probability);
  return node;
}
