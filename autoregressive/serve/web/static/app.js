// The page: ties the parts together. Settings become plans, plans wait in the queue, runs draw
// them, and the gallery keeps their pictures.

import { addressOf, readAddress, writeAddress } from "./address.js";
import { ClassPicker } from "./combobox.js";
import { Connection } from "./connection.js";
import { announce, byId, calm, copyText, element, furnish, onClick, toast } from "./dom.js";
import { SettingsForm, inWordsOfThePage, randomSeed } from "./form.js";
import { Gallery } from "./gallery.js";
import { GridForm } from "./grid.js";
import { KeyForm } from "./key_form.js";
import { Presets } from "./presets.js";
import { Queue } from "./queue.js";
import { gridOf, recordOf, requestOf } from "./records.js";
import { Run } from "./run.js";
import { listenToKeys } from "./shortcuts.js";
import { showClass } from "./thumbnails.js";
import { keepUnfinished, unfinished } from "./unfinished.js";
import { Viewer } from "./viewer.js";
import { describe, factsOf, sentence } from "./words.js";

const SUGGESTIONS = 6;
const HOLD_SECONDS = 3; // where the server does not say when to try again
const TAKEN = "The form has the settings of this picture";
const AS_SOON = "This is drawn as soon as it can be.";

let model = null;
// Generate was pressed before the server had said what it draws. The form is read once it has.
let pressed = false;
let whyNot = "The server has not answered yet.";
let latest = 0; // when the newest plan was made
let leaving = false; // what fails now is to go on when the page is loaded again

const picker = new ClassPicker({
  thumbnail,
  onChange: () => {
    form.clear(byId("class"));
    changed();
  },
});
const form = new SettingsForm(byId("composer"), picker, { onChange: changed });
const queue = new Queue({ onChange: showProgress });
const gallery = new Gallery({
  open: (tile) => viewer.show(tile),
  compare: (tiles) => viewer.compare(tiles),
  again: ({ request }) => again(request),
});
const viewer = new Viewer({
  tiles: () => gallery.tiles,
  again: ({ request }) => again(request),
  use: ({ className, request }) => use({ ...request, class_name: className }, TAKEN),
  remove: (tile) => gallery.remove([tile]),
  link: ({ className, request }) => addressOf({ ...request, class_label: className }),
});
const connection = new Connection({ onReady: connected, onAway: away, onKey: askForKey });
const keyForm = new KeyForm({
  connected: () => model !== null && !whyNot,
  onKey: async () => {
    away("The key is being checked.");
    await connection.waiting; // its answer may still be that of the old key
    return connection.connect();
  },
});

furnish();

// The settings

/** What was filled in, as text by the names of a request's fields. */
function settings() {
  return { class_label: picker.text, ...form.filledIn };
}

function changed() {
  if (pressed) {
    pressed = false; // what is being filled in now is not what was asked for
    complain("");
  }
  writeAddress(settings());
  presets.compare();
}

/** Fills in the settings of a picture, a preset or an address. */
function use(given, words) {
  const { class_label: label, class_name: name } = given;
  const named = picker.classes.find((option) => option.name === name); // of another model, perhaps
  if (name === undefined) picker.type(label);
  else if (picker.optionOf(label)?.name === name) picker.choose(label);
  else if (named) picker.choose(named.id);
  else picker.type("");
  form.fill(given);
  if (words) toast(words);
  if (name === undefined || picker.value) byId("generate").focus();
  else form.mark("class_label", `This model has no class “${name}”.`);
}

async function useFile(file) {
  const record = await recordOf(file);
  if (!record) {
    toast("There are no settings in this file");
    return;
  }
  use(requestOf(record), TAKEN);
  const grid = gridOf(record);
  if (grid && gridForm.fill(grid)) toast("The form has this grid");
}

function complain(words) {
  byId("composer-error").textContent = words;
  byId("composer-error").hidden = !words;
}

// The server

/** From now on this is why nothing can be drawn. */
function away(words) {
  whyNot = words;
  queue.block(words);
  if (pressed) complain(`${words} ${AS_SOON}`);
}

function askForKey(failure) {
  connection.hideNotice();
  away(describe(failure).title);
  keyForm.ask(failure);
}

async function connected({ model: found, classes, limits, described }) {
  const [first, asked] = [model === null, pressed];
  model = found;
  whyNot = "";
  picker.setClasses(classes);
  byId("model-facts").textContent = `${model.id} · ${model.image_size} × ${model.image_size}`;
  byId("api-link").hidden = !described;
  keyForm.settle();
  if (model.trained === false)
    connection.notice(
      "This model is not trained.",
      "Its weights are random, so its pictures are noise; the speed is real.",
      "trouble",
    );
  if (first) {
    form.suit(model, limits);
    suggest();
    announce("Ready");
    if (document.activeElement !== picker.input) picker.commit();
  }
  complain("");
  await loaded;
  if (whyNot) return; // the server has gone again meanwhile
  queue.unblock();
  pressed = false;
  if (asked) generate();
}

function thumbnail(node, id) {
  showClass(node, id, model, gallery.newest(model, id));
}

function suggest() {
  const left = [...picker.classes];
  const chosen = [];
  while (chosen.length < SUGGESTIONS && left.length)
    chosen.push(...left.splice(Math.floor(Math.random() * left.length), 1));
  const draw = (id) => {
    picker.choose(id);
    generate({ focus: true });
  };
  byId("suggestions").replaceChildren(
    ...chosen.map(({ id, name }) =>
      element(
        "button",
        { type: "button", class: "chip", on: { click: () => draw(id) } },
        element("span", { class: "option-picture" }),
        name,
      ),
    ),
  );
  chosen.forEach(({ id }, at) => thumbnail(byId("suggestions").children[at].firstChild, id));
  byId("welcome-text").hidden = false;
}

// Drawing

function generate({ focus = false } = {}) {
  complain("");
  if (model === null) {
    pressed = true;
    complain(`${whyNot} ${AS_SOON}`);
    if (!keyForm.isOpen) connection.connect();
    return;
  }
  const request = form.read();
  if (request !== null) draw(request, { focus });
}

function draw(request, options) {
  const { name } = picker.optionOf(request.class_label) ?? { name: `class ${request.class_label}` };
  const cells = [{ request, name, words: "" }];
  plan({ name, facts: factsOf(request), columns: 0, cells }, options);
}

function plan(asked, { focus = false } = {}) {
  latest = Math.max(latest + 1, Date.now());
  const id = `${latest}-${randomSeed()}`;
  enqueue({ id, created: latest, request: asked.cells[0].request, ...asked }, focus);
}

function enqueue(planned, focus = false) {
  const run = new Run(planned, () => model, {
    strip: (wanted) => gallery.strip(wanted),
    keep: (picture, tile) => gallery.add(picture, tile),
    kept: () => gallery.settled(),
    onChange: showProgress,
    onEnd: (strip) => gallery.settle(strip),
    onFailure: deal,
    retry: ({ plan: failed }) => enqueue(failed, true),
    dismiss: ({ strip }) => {
      strip.trouble.hidden = true;
      gallery.settle(strip);
    },
  });
  queue.add(run);
  const { strip } = run;
  if (focus) (strip?.cancel ?? run.line?.querySelector("button"))?.focus({ preventScroll: true });
  const node = strip?.node ?? byId("queue");
  const { top } = node.getBoundingClientRect();
  if (top < 0 || top > innerHeight - 100)
    node.scrollIntoView({ behavior: calm() ? "auto" : "smooth", block: "start" });
}

function again(request) {
  let seed = randomSeed();
  while (seed === request.seed) seed = randomSeed();
  draw({ ...request, seed }, { focus: true });
}

/** @returns {boolean} whether a failure is told elsewhere than at the run */
function deal(run, failure) {
  const { title } = describe(failure);
  if (failure.status === 401) {
    askForKey(failure);
    return true;
  }
  if (failure.kind === "network") {
    away(title);
    connection.connect();
    return true;
  }
  if (failure.status === 429 || failure.status === 503) {
    queue.hold(sentence(failure.message) || title, failure.retryAfter ?? HOLD_SECONDS);
    if (failure.status === 503) connection.connect();
    return true;
  }
  const rejected = (failure.status === 400 || failure.status === 422) && failure.param;
  const words = sentence(inWordsOfThePage(failure.message)) || title;
  if (!rejected || !form.mark(failure.param, words)) return false;
  announce(words);
  return true;
}

function showProgress() {
  if (!leaving) keepUnfinished(queue.runs.map((run) => run.plan));
  const { active } = queue;
  const share = active.reduce((sum, run) => sum + run.share, 0) / active.length;
  document.title = active.length ? `${Math.floor(share * 100)} % · LlamaGen` : "LlamaGen";
}

// What can be pressed

byId("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  generate();
});
onClick("class-random", () => {
  const { classes } = picker;
  if (!classes.length) return;
  const { id, name } = classes[Math.floor(Math.random() * classes.length)];
  picker.choose(id);
  announce(name);
});
onClick("defaults", () => {
  form.backToDefaults();
  announce("The settings are the model's");
});
onClick("copy-link", () =>
  copyText(addressOf(settings()), "The link is copied"),
);
onClick("help-button", () => byId("help").showModal());
const gridForm = new GridForm(form, picker, { onDraw: plan });
const presets = new Presets({
  settings,
  use: (given) => {
    form.backToDefaults();
    use(given);
  },
});

document.addEventListener("dragover", (event) => event.preventDefault());
document.addEventListener("drop", (event) => {
  event.preventDefault();
  const [file] = event.dataTransfer.files;
  if (file) useFile(file);
});
document.addEventListener("paste", (event) => {
  const [file] = event.clipboardData?.files ?? [];
  if (!file) return;
  event.preventDefault();
  useFile(file);
});

addEventListener("pagehide", () => {
  leaving = true;
  queue.block("This page is being left.");
});
addEventListener("pageshow", ({ persisted }) => persisted && location.reload());

// The theme

const THEMES = { system: "as the system", light: "light", dark: "dark" };

function showTheme() {
  const { chosen } = document.documentElement.dataset;
  const themeButton = byId("theme-button");
  const words = `Theme: ${THEMES[chosen]}`;
  themeButton.setAttribute("aria-label", words);
  themeButton.title = words;
  themeButton.querySelector("use").setAttribute("href", `#icon-${chosen}`);
}

onClick("theme-button", () => {
  const { chosen } = document.documentElement.dataset;
  const systemIsDark = matchMedia("(prefers-color-scheme: dark)").matches;
  // The first press changes what is seen.
  const order = systemIsDark ? ["system", "light", "dark"] : ["system", "dark", "light"];
  window.setTheme(order[(order.indexOf(chosen) + 1) % order.length]);
  announce(byId("theme-button").title);
});
document.addEventListener("themechange", showTheme);
showTheme();

// The start

byId("shortcut").textContent = /Mac|iPhone|iPad/.test(navigator.platform) ? "⌘ ↵" : "Ctrl ↵";
listenToKeys();
const given = readAddress();
if (given.class_label) picker.type(given.class_label);
form.fill(given);
const waiting = unfinished(); // read before the queue says that there are none
queue.block(whyNot);
const loaded = gallery.load();
for (const planned of waiting) enqueue(planned);
connection.connect();
