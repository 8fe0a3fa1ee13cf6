// JSON with seeds, which have up to 63 bits: JavaScript's numbers would round them. Here a seed is
// text.

/** JSON in which the integers of these names, and those of their lists, become text. */
export function readExactly(text, ...names) {
  const name = ["seed", ...names].join("|");
  const pattern = new RegExp(`"(?:${name})"\\s*:\\s*(?:\\d+(?=\\s*[,}])|\\[[\\d\\s,]*\\])`, "g");
  return JSON.parse(text.replace(pattern, (found) => found.replace(/\d+/g, '"$&"')));
}

/** An object as JSON, in which seeds are numbers. */
export function writeExactly(object) {
  return JSON.stringify(object).replace(
    /("seed":)("\d+"|\["\d+"(?:,"\d+")*\])/g,
    (_, name, seeds) => name + seeds.replaceAll('"', ""),
  );
}
