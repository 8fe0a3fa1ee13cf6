// Elements made and found. Text goes in as text: nothing here, or anywhere else, parses HTML.

export const byId = (id) => document.getElementById(id);
export const onClick = (id, action) => byId(id).addEventListener("click", action);

/**
 * Makes an element.
 * @param {string} tag
 * @param {Object} properties attributes; `on` holds listeners; false and null omit an attribute
 * @param {...(Node|string|null)} children
 */
export function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name === "on") {
      for (const [event, listener] of Object.entries(value)) made.addEventListener(event, listener);
    } else if (value !== false && value !== null && value !== undefined) {
      made.setAttribute(name, value === true ? "" : String(value));
    }
  }
  made.append(...children.filter((child) => child !== null));
  return made;
}

const SVG = "http://www.w3.org/2000/svg";

/** One of the drawings at the top of index.html. */
export function icon(name) {
  const drawing = document.createElementNS(SVG, "svg");
  drawing.setAttribute("class", "icon");
  drawing.setAttribute("aria-hidden", "true");
  drawing.setAttribute("viewBox", "0 0 24 24");
  const use = document.createElementNS(SVG, "use");
  use.setAttribute("href", `#icon-${name}`);
  drawing.append(use);
  return drawing;
}

/** Draws what index.html only names, shows the words of buttons that have none to see, and ties each
 * field to its hint and to the place where it says what is wrong.
 */
export function furnish() {
  for (const node of document.querySelectorAll("[data-icon]"))
    node.prepend(icon(node.dataset.icon));
  for (const node of document.querySelectorAll(".bare[aria-label]"))
    node.title = node.getAttribute("aria-label");
  for (const dialog of document.querySelectorAll("dialog"))
    dialog.addEventListener("click", ({ target, clientX: x, clientY: y }) => {
      const { left, right, top, bottom } = dialog.getBoundingClientRect();
      const beside = target === dialog && (x < left || x > right || y < top || y > bottom);
      if (beside || target.closest(".closes")) dialog.close();
    });
  for (const input of document.querySelectorAll(".field input:not([type=range])")) {
    const field = input.closest(".field");
    const hints = [...field.querySelectorAll(".hint")];
    hints.forEach((hint) => (hint.id = `${input.id}-hint`));
    const error = element("p", { class: "field-error", id: `${input.id}-error`, hidden: true });
    field.append(error);
    const about = [input.getAttribute("aria-describedby"), ...[...hints, error].map(({ id }) => id)];
    input.setAttribute("aria-describedby", about.filter(Boolean).join(" "));
  }
}

/** A button with a drawing and words. A bare one shows the drawing; readers hear the words. */
export function button(words, { drawing = null, bare = false, kind = "", ...properties } = {}) {
  return element(
    "button",
    {
      type: "button",
      class: `button ${kind} ${bare ? "bare" : ""}`,
      ...(bare ? { "aria-label": words, title: words } : {}),
      ...properties,
    },
    drawing ? icon(drawing) : null,
    bare ? null : element("span", {}, words),
  );
}

export const calm = () => matchMedia("(prefers-reduced-motion: reduce)").matches;

/** Says something to screen readers, when they have finished what they are saying. */
export function announce(words) {
  const region = byId("announcer");
  region.textContent = "";
  region.append(element("p", {}, words));
}

/** Has the browser save a file. */
export function save(blob, name) {
  const url = URL.createObjectURL(blob);
  element("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 60_000);
}

/** Copies text, or says why that is not possible. */
export async function copyText(text, words) {
  try {
    await navigator.clipboard.writeText(text);
    toast(words);
  } catch {
    toast(`This browser does not let the page copy: ${text}`);
  }
}

let hiding = null;

/** Says something to everybody, for a while. */
export function toast(words, ...children) {
  clearTimeout(hiding);
  const box = byId("toast");
  (document.querySelector("dialog[open]") ?? document.body).append(box); // what is behind is inert
  box.replaceChildren(element("p", {}, words), ...children);
  const hide = () => box.replaceChildren();
  hiding = setTimeout(hide, children.length ? 10_000 : 4_000);
  return hide;
}
