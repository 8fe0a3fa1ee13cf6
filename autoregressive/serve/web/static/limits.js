// What a field may hold: the limits that the server's description tells.

/** @returns {Object} by name {whole, least, above, most}; empty without a description */
export function limitsOf(description) {
  const fields = description?.components?.schemas?.StreamRequest?.properties ?? {};
  const limits = {};
  for (const [name, field] of Object.entries(fields)) {
    const kinds = field.anyOf ?? [field];
    const kind = kinds.find(({ type }) => type === "integer" || type === "number");
    if (!kind) continue;
    limits[name] = {
      whole: kind.type === "integer",
      least: kind.minimum ?? kind.exclusiveMinimum,
      above: kind.exclusiveMinimum !== undefined,
      most: kind.maximum,
    };
  }
  return limits;
}

/** @returns {string} what is wrong with what was typed; nothing if nothing is */
export function complaintOf(text, { whole = false, least, above = false, most } = {}) {
  if (!text.trim() || !Number.isFinite(Number(text))) return "A number is needed here.";
  if (whole && !/^[+-]?\d+$/.test(text.trim())) return "A whole number is needed here.";
  const number = (digits) => (whole ? BigInt(digits) : Number(digits));
  const value = number(text.trim());
  const low = least !== undefined && (value < number(least) || (above && value === number(least)));
  const high = most !== undefined && value > number(most);
  if (!low && !high) return "";
  return above ? `Above ${least} and at most ${most}.` : `From ${least} to ${most}.`;
}
