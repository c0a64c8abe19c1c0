// What this browser keeps: who rates, and scores that are not saved yet.

const lasting = () => window.localStorage;
const ofThisTab = () => window.sessionStorage;

function read(storage, name) {
  try {
    return storage().getItem(`milepost-rate-${name}`);
  } catch {
    return null; // storage is forbidden
  }
}

/** Returns whether it is kept: storage may be full or forbidden. */
function write(storage, name, value) {
  try {
    if (value === null) storage().removeItem(`milepost-rate-${name}`);
    else storage().setItem(`milepost-rate-${name}`, value);
    return true;
  } catch {
    return false;
  }
}

/** Who rates in this tab; null where nobody has said. */
export const raterOfThisTab = () => read(ofThisTab, "rater");

/** Who rated last in this browser. */
export const lastRater = () => read(lasting, "rater");

export function keepRater(name) {
  write(lasting, "rater", name);
  write(ofThisTab, "rater", name);
}

export const forgetRaterOfThisTab = () => write(ofThisTab, "rater", null);

/** The scores of a presentation that were given and not saved, by criterion. */
export function readDraft(key, { lowest, highest, criteria }) {
  const known = criteria.map((criterion) => criterion.key);
  const isScore = (n) => Number.isInteger(n) && n >= lowest && n <= highest;
  try {
    const draft = JSON.parse(read(lasting, `draft-${key}`)) ?? {};
    return Object.fromEntries(
      Object.entries(draft).filter(([name, n]) => known.includes(name) && isScore(n)),
    );
  } catch {
    return {};
  }
}

/** Keeps the unsaved scores; where that fails, closing the page asks first. */
export function keepDraft(key, scores) {
  const isKept = write(lasting, `draft-${key}`, JSON.stringify(scores));
  window.onbeforeunload = isKept ? null : (event) => event.preventDefault();
}

export function dropDraft(key) {
  write(lasting, `draft-${key}`, null);
  window.onbeforeunload = null;
}
