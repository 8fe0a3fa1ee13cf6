// The runs of this tab that are not finished. They survive a reload.

import { tab } from "./storage.js";

const NAME = "runs";

/** @returns {Object[]} their plans, in order */
export const unfinished = () => tab.read(NAME, []);

export function keepUnfinished(plans) {
  const text = JSON.stringify(plans);
  if (text !== tab.get(NAME)) tab.set(NAME, text);
}
