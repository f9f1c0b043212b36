// A state of the form as the fragment of an address, which browsers do not send to servers.

/**
 * { text, model, seed, lanes: [{ strategy, steps, "option.temperature", … }, …] } as a fragment.
 * The fields of the second lane start with "2.".
 */
export function toFragment({ text, model, seed, lanes }) {
  const fields = new URLSearchParams();
  if (text) fields.set("text", text);
  if (model) fields.set("model", model);
  if (seed && seed !== "0") fields.set("seed", seed);
  lanes.forEach((lane, i) => {
    for (const [name, value] of Object.entries(lane)) fields.set(i ? `2.${name}` : name, value);
  });
  return fields.toString();
}

/** The state of a fragment; null where it is none of ours, such as the name of a section. */
export function fromFragment(fragment) {
  const { text, model, seed, ...rest } = Object.fromEntries(new URLSearchParams(fragment.replace(/^#/, "")));
  const lanes = [{}, {}];
  for (const [name, value] of Object.entries(rest)) {
    if (name.startsWith("2.")) lanes[1][name.slice(2)] = value;
    else lanes[0][name] = value;
  }
  if (!text && !lanes[0].strategy) return null;
  return { text, model, seed, lanes: lanes[1].strategy ? lanes : lanes.slice(0, 1) };
}
