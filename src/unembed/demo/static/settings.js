// The controls of one strategy, made from what the server says the strategy takes.

import { make, stamp } from "./dom.js";

const TITLES = {
  greedy: "Greedy",
  "entropy-bounded": "Entropy-bounded",
  euler: "Euler sampling",
  "euler-remask": "Euler, remasking",
  "two-stage": "Two-stage",
  "best-of": "Best of N",
  residual: "Residual steering",
  "guided-search": "Guided search",
};

export const titleOf = (name) => TITLES[name] ?? name;

export class Settings {
  /** @param legend Heading of the group. @param changed Called after every change. */
  constructor(legend, changed) {
    this.node = stamp("strategy-template");
    this.node.querySelector("legend").textContent = legend;
    this.select = this.node.querySelector("select");
    this.fields = this.node.querySelector(".fields");
    this.select.addEventListener("change", () => this.#build());
    this.node.addEventListener("input", changed);
  }

  /** Offer what a model can do; a strategy it has too stays chosen. */
  offer(model, preferred) {
    const before = this.select.value || preferred;
    this.model = model;
    const groups = new Map([["Vector only", []], ["May ask the encoder", []]]);
    for (const [name, { needs_encoder: asks }] of Object.entries(model.strategies)) {
      const option = make("option", { value: name }, titleOf(name));
      groups.get(asks ? "May ask the encoder" : "Vector only").push(option);
    }
    const filled = [...groups].filter(([, options]) => options.length);
    this.select.replaceChildren(...filled.map(([label, all]) => make("optgroup", { label }, ...all)));
    this.select.value = Object.hasOwn(model.strategies, before) ? before : Object.keys(model.strategies)[0];
    this.#build();
  }

  #build() {
    const { model } = this;
    const strategy = model.strategies[this.select.value];
    const { temperature, ...options } = strategy.options;
    const steps = { type: "int", default: model.default_steps, minimum: 1, maximum: model.max_steps };
    const calls = { type: "int", default: model.default_encoder_calls, minimum: 1, maximum: model.max_encoder_calls };
    const strength = model.guidance && { type: "float", default: 0, minimum: 0 };
    const fields = [
      field("steps", "Steps", steps),
      field("calls", "Encoder calls", strategy.needs_encoder && calls, "This strategy does not ask the encoder."),
      field("option.temperature", "Temperature", temperature, "This strategy draws nothing at random."),
      field("early", "Guidance, early", strength, "This model was not trained for guidance."),
      field("late", "Guidance, late", strength, "This model was not trained for guidance."),
      ...Object.entries(options).map(([name, option]) => field(`option.${name}`, title(name), option)),
    ];
    this.fields.replaceChildren(...fields);
    this.node.querySelector(".threat").textContent = strategy.needs_encoder
      ? "The attacker holds the vector and may also embed guesses."
      : "The attacker holds the vector, nothing else.";
  }

  get #inputs() {
    return this.fields.querySelectorAll(":is(input, select):not([disabled])");
  }

  /** What differs from the defaults, by field name; the strategy always. */
  get values() {
    const found = { strategy: this.select.value };
    for (const input of this.#inputs) {
      const value = input.type === "checkbox" ? String(input.checked) : input.value;
      if (value !== "" && value !== input.dataset.default) found[input.name] = value;
    }
    return found;
  }

  /** Take on values as `values` gives them; what this model does not know is passed over. */
  set values(wanted) {
    if (Object.hasOwn(this.model.strategies, wanted.strategy ?? "")) this.select.value = wanted.strategy;
    this.#build();
    for (const input of this.#inputs) {
      const value = wanted[input.name];
      if (value === undefined) continue;
      if (input.type === "checkbox") input.checked = value === "true";
      else input.value = value;
    }
  }

  /** These settings as the body of a request. */
  get request() {
    const { strategy, steps, calls, early, late, ...rest } = this.values;
    const asked = { strategy, options: {} };
    for (const [name, value] of Object.entries(rest)) {
      const option = name.slice("option.".length);
      asked.options[option] = typed(value, this.model.strategies[strategy].options[option].type);
    }
    if (steps !== undefined) asked.steps = Number(steps);
    if (early !== undefined || late !== undefined) asked.guidance = [Number(early ?? 0), Number(late ?? 0)];
    if (calls !== undefined) asked.encoder_calls = Number(calls);
    return asked;
  }

  /** Settings in a few words. */
  get summary() {
    const { strategy, ...rest } = this.values;
    const words = Object.entries(rest).map(([name, value]) => `${title(name.replace("option.", ""))} ${value}`);
    return [titleOf(strategy), ...words].join(", ");
  }
}

const title = (name) => name[0].toUpperCase() + name.slice(1).replaceAll("_", " ");

function typed(value, type) {
  if (type === "bool") return value === "true";
  return type === "str" ? value : Number(value);
}

/** A labelled control; without a description of it one that is switched off, and says why. */
function field(name, label, option, why) {
  if (!option) {
    const off = make("input", { name, type: "text", disabled: true, placeholder: "–" });
    return make("label", { title: why }, `${label} `, off);
  }
  const { type, default: usual, description, choices, minimum, maximum } = option;
  const dataset = String(usual);
  let input;
  if (choices) {
    input = make("select", { name }, ...choices.map((choice) => make("option", { value: choice }, choice)));
    input.value = usual;
  } else if (type === "bool") {
    input = make("input", { name, type: "checkbox", checked: usual });
  } else if (type === "str") {
    input = make("input", { name, type: "text", value: usual });
  } else {
    input = make("input", { name, type: "number", step: type === "int" ? "1" : "any", value: dataset });
    if (minimum !== undefined) input.min = minimum;
    if (maximum !== undefined) input.max = maximum;
  }
  input.dataset.default = dataset;
  return make("label", description ? { title: description } : {}, `${label} `, input);
}
