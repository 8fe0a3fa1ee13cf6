// The runs of this tab that are not finished. They survive a reload.

const NAME = "runs";
let written = null;

/** @returns {Object[]} their plans, in order */
export function unfinished() {
  try {
    const found = JSON.parse(sessionStorage.getItem(NAME) ?? "[]");
    return Array.isArray(found) ? found : [];
  } catch {
    return [];
  }
}

export function keepUnfinished(plans) {
  const text = JSON.stringify(plans);
  if (text === written) return;
  written = text;
  try {
    sessionStorage.setItem(NAME, text);
  } catch {
    // where storage is switched off they last as long as the page
  }
}
