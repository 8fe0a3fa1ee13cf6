// The fields of the form: reading them, checking them, and marking what is wrong.

import { byId } from "./dom.js";

const NUMBERS = ["n", "seed", "cfg_scale", "cfg_interval", "temperature", "top_k", "top_p"];
const SAMPLING = ["cfg_scale", "cfg_interval", "temperature", "top_k", "top_p"];
// Exclusive. Every program reads such a number exactly; JSON's numbers are exact up to 2 ** 53.
const LARGEST_SEED = 2 ** 31;

export function randomSeed() {
  return crypto.getRandomValues(new Uint32Array(1))[0] % LARGEST_SEED;
}

function complaintOf(input) {
  const { validity, min, max, step } = input;
  if (validity.badInput) return "This is not a number.";
  if (validity.valueMissing) return "A number is needed here.";
  if (validity.rangeUnderflow || validity.rangeOverflow) {
    return min && max ? `From ${min} to ${max}.` : min ? `At least ${min}.` : `At most ${max}.`;
  }
  if (validity.stepMismatch && step === "1") return "A whole number is needed here.";
  return null;
}

export class SettingsForm {
  constructor(form, picker) {
    this.form = form;
    this.picker = picker;
    this.filledIn = new Set(); // names of the fields that somebody has filled in
    for (const slider of form.querySelectorAll("input[type=range]")) {
      const input = byId(slider.dataset.for);
      slider.addEventListener("input", () => {
        input.value = slider.value;
        this.filledIn.add(input.id);
        this.#clear(input);
        this.#paint(slider);
      });
      input.addEventListener("input", () => this.#follow(slider));
      this.#follow(slider);
    }
    for (const name of NUMBERS) {
      byId(name).addEventListener("input", (event) => {
        this.filledIn.add(name);
        this.#clear(event.target);
      });
    }
    for (const stepButton of form.querySelectorAll("[data-step]")) {
      stepButton.addEventListener("click", () => {
        const input = byId("n");
        const next = (Number(input.value) || 1) + Number(stepButton.dataset.step);
        input.value = Math.min(10, Math.max(1, next));
        this.#clear(input);
      });
    }
  }

  /** Takes the model's own settings for every field that nobody has filled in meanwhile. */
  suit({ defaults = {}, codebook_size: codebook }) {
    this.defaults = defaults;
    this.#setDefaults(SAMPLING.filter((name) => !this.filledIn.has(name)));
    byId("top_k-hint").textContent = `The k likeliest of ${codebook} tokens; 0 is all.`;
  }

  backToDefaults() {
    this.#setDefaults(SAMPLING);
  }

  /** Fills the form with the settings of a picture. */
  fill(request) {
    this.picker.choose(request.class_label);
    for (const name of NUMBERS) {
      this.filledIn.add(name);
      this.#set(name, request[name]);
    }
    if (SAMPLING.slice(1).some((name) => request[name] !== this.defaults?.[name]))
      byId("more").open = true;
  }

  /** @returns {Object|null} the request; null if a field is wrong: it is marked and focused */
  read() {
    this.clearAll();
    this.picker.commit();
    const { value } = this.picker;
    if (value === null) {
      this.mark("class_label", this.picker.complaint);
      return null;
    }
    const request = { class_label: value.id };
    const wrong = [];
    for (const name of NUMBERS) {
      const input = byId(name);
      const complaint = complaintOf(input);
      if (complaint !== null) wrong.push([name, complaint]);
      else request[name] = input.value === "" ? randomSeed() : Number(input.value);
    }
    // The last that is marked has the focus, so the first wrong field is marked last.
    for (const [name, complaint] of wrong.reverse()) this.mark(name, complaint);
    return wrong.length ? null : request;
  }

  /** Says at a field what is wrong with it. @returns {boolean} whether there is such a field */
  mark(param, complaint) {
    const field = this.form.querySelector(
      `[data-param="${CSS.escape(param === "prompt" ? "class_label" : param)}"]`,
    );
    if (!field) return false;
    const input = field.querySelector("input:not([type=range])");
    const words = byId(`${input.id}-error`);
    words.textContent = complaint;
    words.hidden = false;
    input.setAttribute("aria-invalid", "true");
    const details = field.closest("details");
    if (details) details.open = true;
    input.focus();
    return true;
  }

  clearAll() {
    for (const input of this.form.querySelectorAll("[aria-invalid]")) this.#clear(input);
  }

  #setDefaults(names) {
    for (const name of names)
      if (typeof this.defaults[name] === "number") this.#set(name, this.defaults[name]);
  }

  #set(name, value) {
    const input = byId(name);
    input.value = value;
    this.#clear(input);
    const slider = this.form.querySelector(`input[data-for="${name}"]`);
    if (slider) this.#follow(slider);
  }

  #clear(input) {
    input.removeAttribute("aria-invalid");
    byId(`${input.id}-error`).hidden = true;
  }

  #follow(slider) {
    const { value } = byId(slider.dataset.for);
    if (value !== "") slider.value = value;
    this.#paint(slider);
  }

  #paint(slider) {
    const share = (slider.value - slider.min) / (slider.max - slider.min);
    slider.style.setProperty("--share", `${share * 100}%`);
  }
}
