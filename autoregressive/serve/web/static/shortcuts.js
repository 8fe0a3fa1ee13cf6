// A key for every action. An action is an element with `data-action`: its key presses it.

import { byId, element } from "./dom.js";

export const KEYS = [
  [
    "The page",
    [
      ["generate", "Ctrl+Enter", "Draw"],
      ["class", "/", "Go to the class"],
      ["random", "r", "Pick a class at random"],
      ["another", "+", "One picture more"],
      ["fewer", "-", "One picture fewer"],
      ["more", "m", "Show or hide more settings"],
      ["defaults", "0", "Back to the model's settings"],
      ["grid", "g", "Show or hide the grid's settings"],
      ["draw-grid", "G", "Draw the grid"],
      ["choose", "c", "Choose a preset"],
      ["preset", "p", "Save the settings as a preset"],
      ["forget", "P", "Delete the preset"],
      ["link", "l", "Copy a link to the settings"],
      ["clear", "q", "Clear the queue"],
      ["remove-all", "D", "Delete all pictures"],
      ["theme", "t", "Change between light and dark"],
      ["key", "k", "Enter another key"],
      ["api", "i", "Read about the API"],
      ["help", "?", "Show this help"],
    ],
  ],
  [
    "A run (the newest, or the one in focus)",
    [
      ["cancel", "Escape", "Cancel it"],
      ["again", "a", "Draw it again with another seed"],
      ["sheet", "o", "Download it as one picture"],
      ["retry", "y", "Try again what has failed"],
      ["dismiss", "n", "Dismiss the message"],
    ],
  ],
  [
    "A picture in focus",
    [
      ["select", "x", "Select it"],
      ["download", "d", "Download it"],
      ["remove", "Delete", "Delete it"],
      ["undo", "u", "Take the deletion back"],
    ],
  ],
  [
    "Pictures that are selected",
    [
      ["selecting", "s", "Select pictures, or end that"],
      ["compare", "v", "Show two side by side"],
      ["zip", "z", "Download them as a zip archive"],
      ["remove-selected", "Backspace", "Delete them"],
    ],
  ],
  [
    "The large picture",
    [
      ["previous", "ArrowLeft", "Previous picture"],
      ["next", "ArrowRight", "Next picture"],
      ["zoom", "1", "One pixel for one, or the whole picture"],
      ["copy-seed", "s", "Copy the seed"],
      ["copy-image", "c", "Copy the picture"],
      ["copy-link", "l", "Copy a link to its settings"],
      ["use", "e", "Use its settings"],
      ["again", "a", "Draw it again with another seed"],
      ["download", "d", "Download it"],
      ["remove", "Delete", "Delete it"],
    ],
  ],
];
const FOCUSED_ONLY = ["select", "download", "remove"]; // never a picture that nobody looks at
const SIGNS = { ArrowLeft: "←", ArrowRight: "→", Delete: "Del", Escape: "Esc" };

function listKeys() {
  byId("key-list").replaceChildren(
    ...KEYS.flatMap(([title, keys]) => [
      element("h3", {}, title),
      element(
        "dl",
        {},
        ...keys.map(([, key, words]) =>
          element(
            "div",
            {},
            element("dt", {}, element("kbd", {}, SIGNS[key] ?? key)),
            element("dd", {}, words),
          ),
        ),
      ),
    ]),
  );
}

const isTyping = (node) =>
  node.matches?.("input:not([type=checkbox], [type=range]), select, textarea");

/** The nearest element of one of these actions, from where the focus is outwards. */
function nearest(actions, root) {
  const selector = actions.map((action) => `[data-action="${action}"]`).join();
  const start = root.contains(document.activeElement) ? document.activeElement : root;
  for (let at = start; at; at = at === root ? null : at.parentElement) {
    const found = [...at.querySelectorAll(selector)].filter((node) => node.checkVisibility());
    const allowed = found.filter(
      (node) =>
        !FOCUSED_ONLY.includes(node.dataset.action) ||
        root !== document.body ||
        node.closest(".tile")?.contains(document.activeElement),
    );
    if (allowed.length) return allowed[0];
  }
  return null;
}

/** Presses what a key stands for. @returns {boolean} whether there is such a thing */
function press(key) {
  const root = document.querySelector("dialog[open]") ?? document.body;
  const groups = root === document.body ? KEYS.slice(0, -1) : KEYS.slice(-1);
  const actions = groups
    .flatMap(([, keys]) => keys)
    .filter(([, name]) => name === key)
    .map(([action]) => action);
  const found = actions.length ? nearest(actions, root) : null;
  if (!found || found.disabled) return false;
  if (isTyping(found)) {
    found.focus();
    found.select?.();
  } else found.click();
  return true;
}

export function listenToKeys() {
  listKeys();
  document.addEventListener("keydown", (event) => {
    if (event.defaultPrevented || event.altKey || event.isComposing) return;
    if (event.ctrlKey || event.metaKey) {
      const elsewhere = byId("key-form").contains(event.target);
      const closed = !document.querySelector("dialog[open]");
      if (event.key === "Enter" && closed && !elsewhere) {
        event.preventDefault();
        byId("generate").click();
      }
      return;
    }
    const typing = isTyping(event.target) && event.key !== "Escape";
    if (typing || (event.key === "Escape" && document.querySelector("dialog[open]"))) return;
    if (press(event.key)) event.preventDefault();
  });
}
