// The page: what the person enters, what is asked of the server, and what went wrong.

import { Lost, Refused, isThere, models, random, sentence } from "./api.js";
import { byId, make, number, say } from "./dom.js";
import { Lane } from "./lane.js";
import { fromFragment, toFragment } from "./link.js";
import { Settings } from "./settings.js";
import { Strip } from "./strip.js";
import { Vectors } from "./vectors.js";
import { Words } from "./words.js";

const EXAMPLES = {
  Health: "What are the side effects of this drug?",
  Hospital: "The patient was admitted on Monday with chest pain.",
  Bank: "How do I reset the password of my bank account?",
  Private: "She is moving to Berlin next month.",
  Business: "The company will cut two hundred jobs in March.",
  "A whole note":
    "Mrs. Alvarez came back to the clinic on Tuesday because the pain in her left knee has become worse since the " +
    "operation in May. She sleeps badly, takes two tablets every night and is afraid of a second surgery. Her " +
    "daughter drives her, as she cannot walk down the stairs. I explained the risk of an infection, ordered blood " +
    "tests and an X-ray, and wrote to Doctor Meyer at the hospital in Hamburg to ask for his opinion. The insurance " +
    "refused to pay for the therapy last month; we will send them the report again.",
};
const CUT = "The text is longer than the model writes: part of it cannot come back.";
const AGAIN = 3000; // milliseconds between looks whether a lost server is back
const QUIET = 30000; // ... without a word from the server before people are told
const SILENCE = "Nothing heard from the server for 30 seconds. It may be busy, or the connection lost.";

const system = matchMedia("(prefers-color-scheme: dark)");

const strip = new Strip(byId("strip"), byId("probe"));
const vectors = new Vectors(() => model());
const words = new Words();
const strategies = [new Settings("A", changed), new Settings("B", changed)];

let offered = []; // what GET /models lists
let running = null; // AbortController of the decoding in progress
let timer = null; // of the notice: a countdown, or looking for the server

const model = () => offered.find(({ name }) => name === byId("model").value);
const source = () => byId("form").elements.source.value;
const comparing = () => byId("compare").checked;

// The form

function changed() {
  const shown = comparing() ? strategies : strategies.slice(0, 1);
  byId("summary").textContent = shown.map((each) => each.summary).join("  vs  ");
  strategies[0].node.querySelector("legend").classList.toggle("hidden", !comparing());
  strategies[1].node.hidden = strategies[1].node.disabled = !comparing();
}

function choose(kind) {
  byId("form").elements.source.value = kind;
  byId("from-text").hidden = kind !== "text";
  byId("from-vector").hidden = kind !== "vector";
  byId("text-note").hidden = kind !== "text";
}

/** Which map is on, and what it promises. */
function mapped({ into, method, pairs, cosine, floor, doubt }) {
  const from = `${pairs} leaked pair${pairs === 1 ? "" : "s"} (${method})`;
  const promise = cosine === undefined ? "" : `; leave-one-out cosine ${number(cosine, 2)}, floor ${number(floor, 2)}`;
  return `through a map into the space of ${into} from ${from}${promise}${doubt ? ". It predicts nothing" : ""}`;
}

function describeModel() {
  const { encoder, dimension, max_text_chars: most, length, map } = model();
  byId("text").maxLength = most;
  const words = `texts of up to ${length - 1} tokens`;
  byId("text-note").textContent = map
    ? `embedded with ${map.into}, without the map: it is for vectors of ${encoder}; ${words}`
    : `${encoder}, ${dimension} numbers, ${words}`;
  byId("expected").textContent = `This model reads vectors of ${encoder}: ${dimension} numbers each${map ? `, ${mapped(map)}` : ""}.`;
  if (map) choose("vector");
  strategies[0].offer(model(), "greedy");
  strategies[1].offer(model(), "guided-search");
  changed();
  blank();
}

/** The form as plain data, for a link and for a reload. */
function state() {
  const lanes = comparing() ? strategies : strategies.slice(0, 1);
  return {
    text: source() === "text" ? byId("text").value : "",
    model: offered.length > 1 ? byId("model").value : "",
    seed: byId("seed").value,
    lanes: lanes.map((each) => each.values),
  };
}

function restore({ text, model: name, seed, lanes }) {
  if (text) byId("text").value = text;
  if (offered.some((each) => each.name === name)) byId("model").value = name;
  describeModel();
  if (/^\d+$/.test(seed ?? "")) byId("seed").value = seed;
  byId("compare").checked = lanes.length > 1;
  lanes.forEach((values, i) => (strategies[i].values = values));
  changed();
}

/** Keep the form with this entry of the tab's history: a reload finds it, nobody else. */
function remember(busy, address = location.href) {
  history.replaceState({ ...state(), vector: vectors.remembered, source: source(), busy }, "", address);
}

async function share() {
  const address = new URL(`#${toFragment(state())}`, location.href).href;
  remember(Boolean(running), address);
  const done = await navigator.clipboard?.writeText(address).then(() => true, () => false);
  const what = source() === "text" ? "Link" : "Link with the settings";
  flash(byId("share"), done ? `${what} copied` : "Link is in the address bar");
}

function flash(button, text) {
  const before = (button.dataset.label ??= button.textContent);
  button.textContent = text;
  announce(text);
  setTimeout(() => (button.textContent = before), 2000);
}

function announce(text) {
  byId("status").textContent = text;
}

// Notices: what happened, and a way on

function notify(kind, text, { retry, label = "Try again" } = {}) {
  clearInterval(timer);
  byId("countdown").textContent = "";
  const box = byId("notice");
  box.dataset.kind = kind;
  box.querySelector("p").textContent = text;
  byId("retry").hidden = !retry;
  byId("retry").textContent = label;
  byId("retry").onclick = retry ? () => (hush(), retry()) : null;
  box.hidden = false;
  box.scrollIntoView({ block: "nearest" });
}

function hush() {
  clearInterval(timer);
  timer = null;
  byId("notice").hidden = true;
}

/** Say what went wrong with a request, and offer to repeat it. */
function explain(error, retry, so_far = "") {
  if (error instanceof Refused && error.seconds !== null) return countDown(error, retry);
  if (error instanceof Lost) return lookOut(`${error.message}${so_far}`, retry);
  if (error instanceof Refused) return notify("error", `${error.message}${so_far}`, { retry });
  throw error;
}

function countDown(error, retry) {
  let left = Math.max(1, Math.ceil(error.seconds));
  notify("busy", `${error.message} This tries again by itself.`, { retry, label: "Try now" });
  const tell = () => (byId("countdown").textContent = `in ${left} s`);
  tell();
  timer = setInterval(() => {
    left -= 1;
    tell();
    if (left <= 0) byId("retry").click();
  }, 1000);
}

/** Tell that the server is gone, and when it is back. */
function lookOut(message, retry) {
  const offline = navigator.onLine ? "" : " This device is offline.";
  notify("lost", `${message}${offline} Waiting for the server…`, { retry });
  const mine = (timer = setInterval(async () => {
    if (!(await isThere()) || timer !== mine) return;
    notify("back", "The server is back. Your text and settings are still here.", { retry });
  }, AGAIN));
}

// Running

async function invert() {
  hush();
  const input = await entered();
  if (!input) return;
  running?.abort();
  const mine = (running = new AbortController());
  const lanes = blank();
  const shared = { ...input, model: model().name, seed: Number(byId("seed").value) };
  busy(true);
  announce("Inverting.");
  reveal();
  const listen = watch((data) => {
    if (model().words && (!input.text || data.truncated)) words.show({ ...input, model: shared.model }, mine.signal);
  });
  const ends = await Promise.allSettled(
    lanes.map((lane, i) => lane.run({ ...shared, ...strategies[i].request }, mine.signal, listen)),
  );
  listen.stop();
  if (running !== mine) return;
  running = null;
  busy(false);
  conclude(lanes, ends);
}

/** Fresh lanes, all redacted, for the strategies chosen. */
function blank() {
  words.hide();
  const asked = comparing() ? strategies : strategies.slice(0, 1);
  const titles = asked.length > 1 ? asked.map(({ summary }, i) => `${"AB"[i]}: ${summary}`) : ["What comes back"];
  const lanes = titles.map((title) => new Lane(title, model().length));
  byId("lanes").replaceChildren(...lanes.map(({ node }) => node));
  return lanes;
}

/** Bring the result into view where it is not. */
function reveal() {
  const box = byId("lanes").getBoundingClientRect();
  if (box.bottom > window.innerHeight || box.top < 0) byId("result").scrollIntoView();
}

/** Hears the events of all lanes: draws the embedding, tells the place in the queue; `started`: called once. */
function watch(started) {
  let quiet;
  const heard = (event, data) => {
    clearTimeout(quiet);
    quiet = setTimeout(() => notify("quiet", SILENCE, { retry: invert, label: "Start again" }), QUIET);
    if (byId("notice").dataset.kind === "quiet") hush();
    if (event === "queued" && data.position > 0) {
      notify("busy", `The server is busy: ${data.position} ahead of you. This starts by itself.`);
    }
    if (event === "start") {
      hush();
      embed(data);
      started?.(data);
      started = null;
    }
  };
  heard.stop = () => clearTimeout(quiet);
  heard("begin");
  return heard;
}

function embed({ embedding, encoder, dimension, tokens, length, doubt }) {
  const most = strip.show(embedding);
  byId("embedding").dataset.state = "shown";
  const note = doubt ?? `${dimension} numbers from ${encoder}. All that an attacker needs.`;
  const longer = tokens?.length >= length; // the last position holds the end
  byId("embedding-note").textContent = longer ? `${note} ${CUT}` : note;
  byId("scale-low").textContent = number(-most, 2);
  byId("scale-high").textContent = `+${number(most, 2)}`;
  byId("scale").hidden = false;
}

function conclude(lanes, ends) {
  const failed = ends.findIndex(({ status }) => status === "rejected");
  if (failed < 0) {
    announce(ends.map(({ value }) => sentence(`Done. Recovered: ${value.text || "nothing"}`)).join(" "));
    return;
  }
  const { reason } = ends[failed];
  const reached = lanes[failed].progress;
  if (reason.name === "AbortError") {
    announce("Stopped.");
    return;
  }
  explain(reason, invert, reached ? ` It had come to ${reached}; what was recovered stays below.` : "");
}

/** What to invert: { text } or { embedding }; null, with a message at the field, where it is not usable. */
async function entered() {
  say(byId("text-error"), null);
  if (source() === "vector") return vectors.entered();
  const text = byId("text").value.trim();
  if (text) return { text };
  say(byId("text-error"), "Type a sentence, or pick one of the examples.");
  byId("text").focus();
  return null;
}

function busy(on) {
  byId("invert").textContent = on ? "Stop" : "Invert";
  byId("invert").dataset.busy = on;
  remember(on);
}

// Beginning

function wire() {
  for (const [label, text] of Object.entries(EXAMPLES)) {
    const button = make("button", { type: "button", title: text, onclick: () => put(text) }, label);
    byId("surprise").parentElement.before(make("li", {}, button));
  }
  byId("text").addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    byId("form").requestSubmit();
  });
  byId("form").addEventListener("submit", (event) => {
    event.preventDefault();
    if (running) running.abort();
    else invert();
  });
  byId("source").addEventListener("change", () => choose(source()));
  byId("model").addEventListener("change", describeModel);
  byId("compare").addEventListener("change", changed);
  byId("share").addEventListener("click", share);
  byId("dismiss").addEventListener("click", hush);
  byId("surprise").addEventListener("click", surprise);
  byId("copy-vector").addEventListener("click", copyVector);
  system.onchange = () => theme(system.matches); // until the person chooses
  byId("theme").addEventListener("click", () => {
    system.onchange = null;
    theme(byId("theme").getAttribute("aria-pressed") !== "true");
  });
  window.addEventListener("hashchange", () => {
    const linked = fromFragment(location.hash);
    if (linked) restore(linked);
  });
  vectors.wire(() => choose("vector"));
  byId("strategies").append(...strategies.map((each) => each.node));
}

function put(text) {
  byId("text").value = text;
  say(byId("text-error"), null);
}

async function surprise() {
  try {
    put((await random()).text);
    hush();
  } catch (error) {
    explain(error, surprise);
  }
}

async function copyVector() {
  const done = await navigator.clipboard?.writeText(JSON.stringify(strip.values)).then(() => true, () => false);
  flash(byId("copy-vector"), done ? "Copied" : "The browser does not allow it");
}

function theme(dark) {
  document.documentElement.dataset.theme = dark ? "dark" : "light";
  byId("theme").setAttribute("aria-pressed", dark);
  strip.draw();
}

async function begin() {
  try {
    const answer = await models();
    offered = answer.models;
    byId("model").replaceChildren(...offered.map(({ name }) => make("option", { value: name }, name)));
    byId("model").value = answer.default;
    byId("model-field").hidden = offered.length < 2;
  } catch (error) {
    explain(error, begin);
    return;
  }
  const saved = history.state;
  restore(saved ?? fromFragment(location.hash) ?? { text: EXAMPLES.Health, lanes: [{}] });
  if (saved?.vector) vectors.remembered = saved.vector;
  choose(saved?.source ?? "text");
  byId("invert").disabled = false;
  if (saved?.busy) notify("info", "The page was reloaded, which stopped the inversion. Your input is still here.", { retry: invert, label: "Invert again" });
}

wire();
theme(system.matches);
begin();
