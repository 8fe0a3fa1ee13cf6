// Settings in the address of the page, so that a link leads to them.

const NAMES = {
  class: "class_label",
  pictures: "n",
  seed: "seed",
  guidance: "cfg_scale",
  guided: "cfg_interval",
  temperature: "temperature",
  top_k: "top_k",
  top_p: "top_p",
};

/** What the address says: texts by the names of a request's fields. */
export function readAddress() {
  const given = new URLSearchParams(location.search);
  return Object.fromEntries(
    Object.entries(NAMES)
      .filter(([name]) => given.has(name))
      .map(([name, field]) => [field, given.get(name)]),
  );
}

/** @param {Object} settings texts by the names of a request's fields; empty ones are left out */
export function addressOf(settings) {
  const query = new URLSearchParams();
  for (const [name, field] of Object.entries(NAMES))
    if (settings[field] !== undefined && settings[field] !== "") query.set(name, settings[field]);
  const text = query.toString();
  return new URL(text ? `?${text}` : location.pathname, location.href).href;
}

export function writeAddress(settings) {
  const address = addressOf(settings);
  if (address !== location.href) history.replaceState(null, "", address);
}
