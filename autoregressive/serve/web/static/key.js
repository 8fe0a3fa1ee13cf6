// The key of a server that asks for one: for this tab, or in this browser if that was ticked.

import { browser, tab } from "./storage.js";

const NAME = "api-key";

export const storedKey = () => tab.get(NAME) ?? browser.get(NAME);
export const isRemembered = () => browser.get(NAME) !== null;

export function storeKey(key, remember) {
  forgetKey();
  (remember ? browser : tab).set(NAME, key);
}

export function forgetKey() {
  tab.set(NAME, null);
  browser.set(NAME, null);
}
