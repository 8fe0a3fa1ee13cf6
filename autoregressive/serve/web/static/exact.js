// JSON with seeds, which have up to 63 bits: JavaScript's numbers would round them. Here a seed is
// text.

/** JSON in which the integers of these names become text. */
export function readExactly(text, ...names) {
  const name = ["seed", ...names].join("|");
  const pattern = new RegExp(`("(?:${name})"\\s*:\\s*)(\\d+)(?=\\s*[,}])`, "g");
  return JSON.parse(text.replace(pattern, '$1"$2"'));
}

/** A request as JSON, in which its seed is a number. */
export function writeExactly(request) {
  return JSON.stringify(request).replace(/"seed":"(\d+)"/, '"seed":$1');
}
