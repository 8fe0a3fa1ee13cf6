// The key of a server that asks for one: for this tab, or in this browser if that was ticked.

const NAME = "api-key";
let held = null; // where storage is switched off, the key lasts as long as the page

function from(storage) {
  try {
    return storage().getItem(NAME);
  } catch {
    return null;
  }
}

function into(storage, key) {
  try {
    if (key === null) storage().removeItem(NAME);
    else storage().setItem(NAME, key);
  } catch {
    // `held` has it
  }
}

const tab = () => window.sessionStorage;
const browser = () => window.localStorage;

export const storedKey = () => held ?? from(tab) ?? from(browser);
export const isRemembered = () => from(browser) !== null;

export function storeKey(key, remember) {
  forgetKey();
  held = key;
  into(remember ? browser : tab, key);
}

export function forgetKey() {
  held = null;
  into(tab, null);
  into(browser, null);
}
