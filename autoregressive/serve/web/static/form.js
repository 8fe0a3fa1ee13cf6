// The fields of the form: reading them, checking them, and marking what is wrong.

import { byId } from "./dom.js";
import { complaintOf } from "./limits.js";

const SAMPLING = ["cfg_scale", "cfg_interval", "temperature", "top_k", "top_p"];
const NUMBERS = ["n", "seed", ...SAMPLING];
// Exclusive. Whoever types a seed may use all 63 bits of the server's; one of 31 is easier to say.
const LARGEST_RANDOM_SEED = 2 ** 31;

export function randomSeed() {
  return String(crypto.getRandomValues(new Uint32Array(1))[0] % LARGEST_RANDOM_SEED);
}

const labelOf = (name) =>
  byId(name === "class_label" || name === "prompt" ? "class" : name)?.labels?.[0]?.textContent;

/** A message of the server, in which fields have the names that they have here. */
export function inWordsOfThePage(message) {
  return message.replace(/\b[a-z]+(?:_[a-z]+)*\b/, (word) =>
    [...NUMBERS, "class_label", "prompt"].includes(word) ? labelOf(word) : word,
  );
}

export class SettingsForm {
  #defaults = {};
  #limits = {};
  #filledIn = new Set(); // names of the fields that somebody has filled in

  /** @param {{onChange: () => void}} actions */
  constructor(form, picker, actions) {
    Object.assign(this, { form, picker, actions });
    for (const slider of form.querySelectorAll("input[type=range]")) {
      const input = byId(slider.dataset.for);
      slider.addEventListener("input", () => {
        input.value = slider.value;
        this.#changed(input);
      });
    }
    for (const name of NUMBERS)
      byId(name).addEventListener("input", ({ target }) => this.#changed(target));
    for (const stepButton of form.querySelectorAll("[data-step]")) {
      stepButton.addEventListener("click", () => {
        const input = byId("n");
        const next = (Number(input.value) || 1) + Number(stepButton.dataset.step);
        input.value = Math.min(this.#limits.n?.most ?? 10, Math.max(1, next));
        this.#changed(input);
      });
    }
    for (const name of NUMBERS) this.#follow(name);
  }

  /** Takes the model's own settings for every field that nobody has filled in meanwhile. */
  suit({ defaults = {}, codebook_size: codebook }, limits) {
    this.#defaults = defaults;
    this.#limits = limits;
    for (const name of SAMPLING) if (!this.#filledIn.has(name)) this.#set(name, defaults[name]);
    byId("top_k-hint").textContent = `The k likeliest of ${codebook} tokens; 0 is all.`;
  }

  backToDefaults() {
    for (const name of SAMPLING) {
      this.#filledIn.delete(name);
      this.#set(name, this.#defaults[name]);
    }
    this.actions.onChange();
  }

  /** Fills in settings: texts or numbers by the names of a request's fields. */
  fill(settings) {
    for (const name of NUMBERS) {
      const value = settings[name] ?? null;
      if (value === null) continue;
      if (value === "") this.#filledIn.delete(name);
      else this.#filledIn.add(name);
      this.#set(name, value);
    }
    if (SAMPLING.slice(1).some((name) => this.#differs(name))) byId("more").open = true;
    this.actions.onChange();
  }

  /** What was filled in, as text: what a link or a preset says. */
  get filledIn() {
    const named = NUMBERS.filter((name) => this.#filledIn.has(name));
    return Object.fromEntries(named.map((name) => [name, byId(name).value]));
  }

  #differs(name) {
    const { value } = byId(name);
    return this.#filledIn.has(name) && value !== String(this.#defaults[name] ?? value);
  }

  /**
   * Everything that is wrong is marked at once, and the first of it is focused.
   * @returns {Object|null} the request; null if a field is wrong
   */
  read() {
    this.clearAll();
    this.picker.commit();
    const { value } = this.picker;
    const request = { class_label: value?.id };
    const wrong = value === null ? [["class_label", this.picker.complaintOf()]] : [];
    for (const name of NUMBERS) {
      const text = byId(name).value;
      const isRandom = name === "seed" && !text.trim();
      const complaint = isRandom ? "" : complaintOf(text, this.#limits[name]);
      if (complaint) wrong.push([name, complaint]);
      else if (name === "seed") request.seed = isRandom ? randomSeed() : String(BigInt(text));
      else request[name] = Number(text);
    }
    // The last that is marked has the focus, so the first wrong field is marked last.
    for (const [name, complaint] of wrong.reverse()) this.mark(name, complaint);
    return wrong.length ? null : request;
  }

  /** What is wrong with a value that is meant for a field; nothing if nothing is. */
  complaintOf(name, text) {
    return complaintOf(text, this.#limits[name]);
  }

  /** Says at a field what is wrong with it. @returns {boolean} whether there is such a field */
  mark(param, complaint) {
    const input = byId(param === "prompt" || param === "class_label" ? "class" : param);
    const words = input && byId(`${input.id}-error`);
    if (!words) return false;
    words.textContent = complaint;
    words.hidden = false;
    input.setAttribute("aria-invalid", "true");
    const details = input.closest("details");
    if (details) details.open = true;
    input.focus();
    return true;
  }

  clearAll() {
    for (const input of this.form.querySelectorAll("[aria-invalid]")) this.clear(input);
  }

  clear(input) {
    input.removeAttribute("aria-invalid");
    byId(`${input.id}-error`).hidden = true;
  }

  #set(name, value) {
    const input = byId(name);
    if (value !== undefined) input.value = value;
    this.clear(input);
    this.#follow(name);
  }

  #changed(input) {
    if (input.value === "") this.#filledIn.delete(input.id);
    else this.#filledIn.add(input.id);
    this.clear(input);
    this.#follow(input.id);
    this.actions.onChange();
  }

  #follow(name) {
    const slider = this.form.querySelector(`input[data-for="${name}"]`);
    if (slider && byId(name).value !== "") slider.value = byId(name).value;
  }
}
