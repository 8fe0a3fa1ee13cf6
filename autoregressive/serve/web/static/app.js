// The page: waits for the server, starts drawings, and ties the parts together.

import { getJson } from "./api.js";
import { ClassPicker } from "./combobox.js";
import { announce, byId, calm, element } from "./dom.js";
import { SettingsForm, randomSeed } from "./form.js";
import { Gallery } from "./gallery.js";
import { forgetKey, isRemembered, storeKey, storedKey } from "./key.js";
import { Run } from "./run.js";
import { describe, plural, sentence } from "./words.js";

const READY_AGAIN = 1000; // ms between two questions whether the model is loaded
const REACH_AGAIN = 2000; // and whether the server can be reached
const AT_ONCE = 4; // a browser holds six connections to one server
const SUGGESTIONS = 6;
const AS_SOON = "This is drawn as soon as it can be.";

const pause = (milliseconds) => new Promise((resolve) => setTimeout(resolve, milliseconds));

let model = null;
let runs = []; // newest first
let pending = []; // what was asked for when the server wanted a key, or was not ready
// Generate was pressed before the server had said what it draws. The form is read once it has.
let pressed = false;
let waiting = null; // the wait for the server, while there is one
let whyNot = "The server has not answered yet.";

const picker = new ClassPicker({
  input: byId("class"),
  list: byId("class-list"),
  popup: byId("class-popup"),
  empty: byId("class-empty"),
  badge: byId("class-id"),
  opener: byId("class-open"),
  onChange: () => form.clearAll(),
});
const form = new SettingsForm(byId("composer"), picker);
const gallery = new Gallery({
  onAgain: again,
  onSettings: (request) => {
    form.fill(request);
    byId("generate").focus();
    announce("The form has the settings of this picture");
  },
});

// The server: is it there, is the model loaded, does it want a key

function notice(title, detail = "", kind = "loading") {
  const box = byId("server-notice");
  box.classList.toggle("loading", kind === "loading");
  const [titleNode, detailNode] = box.children;
  // A live region reads a text aloud each time that it is set.
  if (titleNode.textContent !== title) titleNode.textContent = title;
  if (detailNode.textContent !== detail) detailNode.textContent = detail;
  detailNode.hidden = !detail;
  box.hidden = false;
  because(title);
}

/** From now on this is why nothing can be drawn; whoever waits for that is told. */
function because(words) {
  if (words === whyNot) return;
  whyNot = words;
  if (words && (pressed || pending.length)) complain(`${words} ${AS_SOON}`);
}

async function waitForServer() {
  for (;;) {
    try {
      await getJson("ready");
      const [{ data: models }, { data: classes }] = await Promise.all([
        getJson("v1/models"),
        getJson("v1/classes?limit=1000"),
      ]);
      connected(models[0], classes);
      return true;
    } catch (failure) {
      if (failure.status === 401) {
        askForKey(failure);
        return false;
      }
      if (failure.status === 503) {
        if (/being loaded/.test(failure.message)) {
          const [, progress] = failure.message.match(/\((.*)\)/) ?? [];
          notice(
            "The model is being loaded…",
            `${progress ? `${sentence(progress)} ` : ""}This page goes on by itself.`,
          );
        } else notice("The server takes no work now.", sentence(failure.message));
        await pause(READY_AGAIN);
      } else {
        const { title, detail } =
          failure.kind === "cut" ? describe({ kind: "network" }) : describe(failure);
        notice(title, failure.kind === "network" ? "Trying again by itself." : detail, "trouble");
        if (failure.kind === undefined) throw failure;
        await pause(REACH_AGAIN);
      }
    }
  }
}

/** @returns {Promise<boolean>} whether the server is ready and has accepted the key it may want */
function connect() {
  waiting ??= waitForServer().finally(() => {
    waiting = null;
  });
  return waiting;
}

function connected(found, classes) {
  const first = model === null;
  model = found;
  whyNot = "";
  picker.setClasses(classes);
  byId("model-facts").textContent = `${model.id} · ${model.image_size} × ${model.image_size}`;
  byId("key-button").hidden = storedKey() === null;
  byId("server-notice").hidden = true;
  if (model.trained === false) {
    notice(
      "This model is not trained.",
      "Its weights are random, so its pictures are noise; the speed is real.",
      "trouble",
    );
    whyNot = "";
  }
  if (first) {
    form.suit(model);
    suggest();
    announce("Ready");
  }
  complain("");
  for (const asked of pending.splice(0)) start(asked);
  if (pressed) {
    pressed = false;
    generate();
  }
}

function suggest() {
  const left = [...picker.classes];
  const chosen = [];
  while (chosen.length < SUGGESTIONS && left.length)
    chosen.push(...left.splice(Math.floor(Math.random() * left.length), 1));
  byId("suggestions").replaceChildren(
    ...chosen.map(({ id, name }) =>
      element(
        "button",
        {
          type: "button",
          class: "chip",
          on: {
            click: () => {
              picker.choose(id);
              generate({ focus: true });
            },
          },
        },
        name,
      ),
    ),
  );
}

// The key

function showKeyForm(title, detail) {
  byId("key-title").textContent = title;
  byId("key-detail").textContent = detail;
  byId("key-remember").checked ||= isRemembered();
  byId("key-forget").hidden = storedKey() === null;
  byId("key-close").hidden = model === null || whyNot !== "";
  byId("key-form").hidden = false;
  byId("key-button").hidden = false;
  byId("key").focus();
}

function askForKey(failure) {
  const remembered = isRemembered();
  if (failure.keySent) forgetKey();
  const { title, detail } = describe(failure);
  byId("server-notice").hidden = true;
  because(title);
  showKeyForm(title, detail);
  if (remembered) byId("key-remember").checked = true;
  announce(`${title} ${detail}`);
}

function keyComplaint(words) {
  byId("key-error").textContent = words;
  byId("key-error").hidden = !words;
  if (words) {
    byId("key").setAttribute("aria-invalid", "true");
    byId("key").focus();
  } else byId("key").removeAttribute("aria-invalid");
}

async function useKey(event) {
  event.preventDefault();
  const key = byId("key").value.trim();
  keyComplaint(
    !key
      ? "Enter the key."
      : /^[\x21-\x7e]+$/.test(key)
        ? ""
        : "A key has letters, digits and signs only, no spaces.",
  );
  if (!key || byId("key").hasAttribute("aria-invalid")) return;
  storeKey(key, byId("key-remember").checked);
  byId("key-form").hidden = true;
  byId("key").value = "";
  because("The key is being checked.");
  await waiting; // its answer may still be that of the old key
  if (!(await connect())) return;
  // The focus stays where somebody types.
  if (document.activeElement === document.body) byId("generate").focus();
}

byId("key-form").addEventListener("submit", useKey);
byId("key").addEventListener("input", () => keyComplaint(""));
byId("key-forget").addEventListener("click", () => {
  forgetKey();
  byId("key-remember").checked = false;
  announce("The key is forgotten");
  byId("key-form").hidden = true;
  byId("key-button").hidden = true;
  byId("class").focus();
});
byId("key-close").addEventListener("click", () => {
  byId("key-form").hidden = true;
  byId("key-button").focus();
});
byId("key-button").addEventListener("click", () => {
  if (!byId("key-form").hidden) byId("key").focus();
  else
    showKeyForm(
      "API key",
      isRemembered()
        ? "A key is in use and remembered in this browser."
        : "A key is in use until this tab is closed.",
    );
});

// Drawing

function complain(words) {
  byId("composer-error").textContent = words;
  byId("composer-error").hidden = !words;
}

function generate({ focus = false } = {}) {
  complain("");
  if (model === null) {
    pressed = true;
    complain(`${whyNot} ${AS_SOON}`);
    if (byId("key-form").hidden) connect();
    return;
  }
  const request = form.read();
  if (request === null) return;
  if (!whyNot) start(request, { focus });
  else if (pending.length >= AT_ONCE)
    complain(`${whyNot} ${plural(AT_ONCE, "request")} wait for it already.`);
  else {
    complain(`${whyNot} ${AS_SOON}`);
    pending.push(request);
    if (byId("key-form").hidden) connect();
  }
}

function start(request, { focus = false } = {}) {
  if (runs.filter(({ active }) => active).length >= AT_ONCE) {
    complain(
      `${plural(AT_ONCE, "request")} are being drawn already. Wait for one to end, or cancel one.`,
    );
    return null;
  }
  complain("");
  const run = new Run(
    request,
    model,
    picker.optionOf(request.class_label)?.name ?? `class ${request.class_label}`,
    {
      onPicture: (picture) => gallery.add(picture),
      kept: () => gallery.settled(),
      onAgain: again,
      onRetry: (failed) => {
        drop(failed);
        start(failed.request, { focus: true });
      },
      onOpen: (picture) => gallery.show(picture),
      onDownload: (picture) => gallery.download(picture),
      onProgress: showProgress,
      onFailure: deal,
    },
  );
  // The pictures of a run that has ended are in the gallery.
  for (const ended of runs.filter(({ active }) => !active)) drop(ended);
  runs.unshift(run);
  byId("welcome").hidden = true;
  byId("runs").prepend(run.node);
  if (focus) run.cancelButton.focus({ preventScroll: true });
  run.draw();
  showProgress();
  const { top, bottom } = run.node.getBoundingClientRect();
  if (top < 0 || bottom > innerHeight)
    run.node.scrollIntoView({ behavior: calm() ? "auto" : "smooth", block: "start" });
  return run;
}

function drop(run) {
  run.node.remove();
  runs = runs.filter((other) => other !== run);
  byId("welcome").hidden = runs.length > 0;
}

function again(request) {
  let seed = randomSeed();
  while (seed === request.seed) seed = randomSeed();
  start({ ...request, seed }, { focus: true });
}

/** @returns {boolean} whether a failure is told elsewhere than at the run */
function deal(run, failure) {
  if (failure.status === 401) {
    drop(run);
    pending.push(run.request);
    askForKey(failure);
    return true;
  }
  if (failure.status === 503 || failure.kind === "network") connect();
  const rejected = (failure.status === 400 || failure.status === 422) && failure.param;
  if (rejected && form.mark(failure.param, sentence(failure.message) || describe(failure).title)) {
    drop(run);
    announce(sentence(failure.message));
    return true;
  }
  return false;
}

function showProgress() {
  const active = runs.filter(({ active: drawing }) => drawing);
  const share = active.reduce((sum, run) => sum + run.share, 0) / active.length;
  document.title = active.length ? `${Math.floor(share * 100)} % · LlamaGen` : "LlamaGen";
}

byId("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  generate();
});
byId("composer").addEventListener("input", () => {
  if (!pressed) return;
  pressed = false; // what is being filled in now is not what was asked for
  complain("");
});
byId("class-random").addEventListener("click", () => {
  const { classes } = picker;
  if (!classes.length) return;
  const { id, name } = classes[Math.floor(Math.random() * classes.length)];
  picker.choose(id);
  announce(name);
});
byId("defaults").addEventListener("click", () => {
  form.backToDefaults();
  announce("The settings are the model's");
});

document.addEventListener("keydown", (event) => {
  if (event.defaultPrevented || document.querySelector("dialog[open]")) return;
  if (
    event.key === "Enter" &&
    (event.ctrlKey || event.metaKey) &&
    !byId("key-form").contains(event.target)
  ) {
    event.preventDefault();
    generate();
  } else if (event.key === "Escape" && !picker.isOpen) {
    runs.find(({ active }) => active)?.cancel();
  }
});

// The theme, and the rest

const THEMES = { system: "as the system", light: "light", dark: "dark" };

function showTheme() {
  const { chosen } = document.documentElement.dataset;
  const themeButton = byId("theme-button");
  const words = `Theme: ${THEMES[chosen]}`;
  themeButton.setAttribute("aria-label", words);
  themeButton.title = words;
  themeButton.querySelector("use").setAttribute("href", `#icon-${chosen}`);
}

byId("theme-button").addEventListener("click", () => {
  const { chosen } = document.documentElement.dataset;
  const systemIsDark = matchMedia("(prefers-color-scheme: dark)").matches;
  // The first press changes what is seen.
  const order = systemIsDark ? ["system", "light", "dark"] : ["system", "dark", "light"];
  window.setTheme(order[(order.indexOf(chosen) + 1) % order.length]);
  announce(byId("theme-button").title);
});
document.addEventListener("themechange", showTheme);
showTheme();

byId("shortcut").textContent = /Mac|iPhone|iPad/.test(navigator.platform) ? "⌘ ↵" : "Ctrl ↵";
gallery.load();
connect();
