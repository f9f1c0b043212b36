// Small helpers for the document. Text only ever becomes text nodes, never markup.

export const byId = (id) => document.getElementById(id);

/** An element with properties or attributes, and children that are elements or plain text. */
export function make(tag, properties = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in node) node[name] = value;
    else node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}

/** The first element of a copy of a <template>. */
export const stamp = (id) => byId(id).content.firstElementChild.cloneNode(true);

/** Show a text in an element, or hide the element where there is none. */
export function say(node, text) {
  node.textContent = text ?? "";
  node.hidden = !text;
}

export const percent = (share) => `${Math.round(100 * share)} %`;

export const number = (value, digits = 3) =>
  value.toFixed(digits).replace("-", "−");
