// The rating page: shows one completion after another and sends their scores.
//
// The server's record is the truth; this page holds one presentation at a time. Scores that are
// not saved yet lie in the browser's storage, so that a reload or a closed window loses none.
// Texts reach the page as text nodes only.

import * as kept from "/kept.js";
import { addressOf, ask, Refused } from "/server.js";

const SAVE_AGAIN = "Your scores are kept in this window; press Enter to try again.";
const TEN_KEYS = ["t", "T", "-"];

const byId = (id) => document.getElementById(id);
const views = ["start", "round", "done"].map(byId);

let settings; // criteria, lowest, highest, rater, raters
let rater = null;
let place = null; // the presentation on the page, as the server gave it
let progress = null;
let scores = {}; // of the presentation, by criterion
let current = 0; // number of the criterion that takes the next key
let isBusy = false;

// ---- what stands on the page

function showView(name) {
  for (const view of views) view.hidden = view.id !== name;
  window.scrollTo(0, 0);
}

function tell(text, { isError = false } = {}) {
  for (const line of document.querySelectorAll("[data-message]")) {
    line.textContent = text;
    line.classList.toggle("error", isError);
  }
  byId(isError ? "alert" : "status").textContent = text;
  byId(isError ? "status" : "alert").textContent = "";
}

function tellError(error, what = "") {
  if (!(error instanceof Refused)) throw error;
  const sentences = [what, error.message, error.hint].filter(Boolean).map(
    (text) => text[0].toUpperCase() + text.slice(1).replace(/[.\s]+$/, "") + ".",
  );
  const isPassing = error.status === 0 || error.status >= 500;
  if (isPassing && !byId("round").hidden) sentences.push(SAVE_AGAIN);
  tell(sentences.join(" "), { isError: true });
}

function element(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

function buildCriteria() {
  byId("rubric").replaceChildren(...settings.criteria.map((criterion) => element(
    "div", {},
    element("dt", { textContent: criterion.name }),
    element("dd", { textContent: criterion.question }),
  )));
  byId("criteria").replaceChildren(...settings.criteria.map(criterionField));
}

function criterionField(criterion, number) {
  const cells = [];
  for (let score = settings.lowest; score <= settings.highest; score += 1) {
    const input = element("input", { type: "radio", name: criterion.key, value: String(score) });
    input.addEventListener("change", () => { mark(number); give(criterion.key, score); });
    input.addEventListener("focus", () => mark(number));
    cells.push(element("label", {}, input, element("span", { textContent: String(score) })));
  }
  return element(
    "fieldset", { tabIndex: -1 },
    element("legend", {}, element("b", { textContent: criterion.name }), " ",
      element("span", { textContent: criterion.question })),
    element("div", { className: "cells" }, ...cells),
  );
}

const fields = () => [...byId("criteria").children];

function mark(number) {
  current = number;
  fields().forEach((field, n) => field.classList.toggle("current", n === number));
}

function moveTo(number) {
  mark(number);
  fields()[number].focus({ preventScroll: true });
  fields()[number].scrollIntoView({ block: "nearest" });
}

const missing = () => settings.criteria.filter((criterion) => !(criterion.key in scores));
const isChanged = () => settings.criteria.some(({ key }) => scores[key] !== place.scores[key]);

function give(criterion, score) {
  scores[criterion] = score;
  if (isChanged()) kept.keepDraft(place.key, scores);
  else kept.dropDraft(place.key);
  drawScores();
  tell("");
}

function drawScores() {
  settings.criteria.forEach(({ key }, number) => {
    for (const input of fields()[number].querySelectorAll("input")) {
      input.checked = Number(input.value) === scores[key];
    }
  });
  byId("next").textContent = isChanged() || missing().length ? "Save and next" : "Next";
}

function drawProgress() {
  const { rated, total } = progress;
  byId("bar").max = total;
  byId("bar").value = rated;
  byId("rated").textContent = `${rated} of ${total} rated`;
  byId("rater").textContent = progress.rater;
}

// ---- from one presentation to the next

/** What is the same for every rater and completion. */
async function prepare() {
  if (settings !== undefined) return;
  settings = await ask("/api/start");
  buildCriteria();
}

async function begin(name) {
  await prepare();
  progress = await ask("/api/rounds", { rater: name });
  rater = progress.rater;
  kept.keepRater(rater);
  await show(progress.next);
}

async function show(key, { note = "" } = {}) {
  if (key === null) {
    showDone();
    return;
  }
  place = await ask(`${addressOf(key)}?${new URLSearchParams({ rater })}`);
  const draft = kept.readDraft(place.key, settings);
  scores = { ...place.scores, ...draft };
  // As it stands in print: the space that parts it from the prompt is not the writer's.
  byId("completion").textContent = place.completion.replace(/^ /, "") || "(nothing)";
  byId("completion").classList.toggle("nothing", !place.completion.trim());
  byId("prompt").textContent = place.prompt;
  byId("where").textContent = `Completion ${place.position} of ${progress.total}`;
  byId("back").disabled = place.previous === null;
  drawScores();
  drawProgress();
  showView("round");
  byId("texts").focus({ preventScroll: true });
  const firstMissing = settings.criteria.findIndex((criterion) => !(criterion.key in scores));
  mark(Math.max(0, firstMissing));
  const isDrafted = Object.keys(draft).length > 0 && isChanged();
  tell(note || (isDrafted ? "The scores you had not saved are back." : ""));
  byId("status").textContent ||= byId("where").textContent;
}

function showDone() {
  byId("thanks").textContent = `Thank you, ${progress.rater}`;
  byId("finished").textContent =
    `All ${progress.total} completions are rated and your scores are on record.`;
  showView("done");
  tell("");
  byId("thanks").focus();
}

async function advance() {
  const open = missing();
  if (open.length) {
    tell(`Still open: ${open.map((criterion) => criterion.name).join(", ")}.`);
    moveTo(settings.criteria.indexOf(open[0]));
    return;
  }
  if (!isChanged()) {
    await show(place.next);
    return;
  }
  try {
    progress = await ask(addressOf(place.key), { rater, scores, seen: place.scores });
  } catch (error) {
    if (error.status === 409) {
      place.scores = error.scores;
      scores = { ...error.scores };
      kept.dropDraft(place.key);
      drawScores();
      tellError(error);
    } else if (error.status === 404) {
      throw error;
    } else {
      tellError(error, "Not saved");
    }
    return;
  }
  kept.dropDraft(place.key);
  await show(progress.next);
}

async function back() {
  if (place.previous !== null) await show(place.previous);
}

async function toFirstOpen() {
  progress = await ask("/api/rounds", { rater });
  await show(progress.next);
}

/** Another window may have rated what this one shows. */
async function lookAgain() {
  const fresh = await ask(`${addressOf(place.key)}?${new URLSearchParams({ rater })}`);
  const isSame = settings.criteria.every(({ key }) => fresh.scores[key] === place.scores[key]);
  if (!isSame && !isChanged()) {
    place = fresh;
    scores = { ...fresh.scores };
    drawScores();
    tell("Rated in another window meanwhile.");
  }
}

/** One piece of work at a time; what the server refuses is said on the page. */
async function run(work) {
  if (isBusy) return;
  isBusy = true;
  try {
    await work();
  } catch (error) {
    if (views.every((view) => view.hidden)) showView("start");
    if (error.status === 404 && rater !== null) await startAnew().catch(tellError);
    else tellError(error);
  } finally {
    isBusy = false;
  }
}

/** The server was started again with other completions. */
async function startAnew() {
  progress = await ask("/api/rounds", { rater });
  rater = progress.rater;
  const note = "The completions of this round have changed; this is the first that is open.";
  await show(progress.next, { note });
}

function askName() {
  kept.forgetRaterOfThisTab();
  byId("name").value = kept.lastRater() ?? "";
  byId("raters").replaceChildren(
    ...settings.raters.map((name) => element("option", { value: name })),
  );
  showView("start");
  tell("");
  byId("name").focus();
  byId("name").select();
}

// ---- keys and buttons

function onKey(event) {
  if (byId("keys").open || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.target.matches("input[type=text]")) return;
  const { key } = event;
  const isPressing = event.target.closest("button, a") && (key === "Enter" || key === " ");
  if (isPressing) return;
  const work = byId("round").hidden ? keyWhenDone(key) : keyOfRound(key, event);
  if (work === null) return;
  event.preventDefault();
  if (!event.repeat || key.startsWith("Arrow")) work();
}

function keyWhenDone(key) {
  const isBack = ["Backspace", "p", "P"].includes(key);
  return isBack && !byId("done").hidden ? () => run(() => show(progress.last)) : null;
}

function keyOfRound(key, event) {
  const last = settings.criteria.length - 1;
  if (/^[0-9]$/.test(key)) return () => scoreCurrent(Number(key));
  if (TEN_KEYS.includes(key)) return () => scoreCurrent(10);
  if (key === "ArrowDown") return () => moveTo(Math.min(last, current + 1));
  if (key === "ArrowUp") return () => moveTo(Math.max(0, current - 1));
  if (key === "ArrowLeft" || key === "ArrowRight") {
    // A focused cell has the browser's own way of moving, which screen readers follow.
    if (event.target.matches("input[type=radio]")) return null;
    return () => shiftCurrent(key === "ArrowLeft" ? -1 : 1);
  }
  if (["Enter", "n", "N"].includes(key)) return () => run(advance);
  if (["Backspace", "p", "P"].includes(key)) return () => run(back);
  if (key === "End") return () => run(toFirstOpen);
  if (key === "?") return () => byId("keys").showModal();
  return null;
}

function scoreCurrent(score) {
  if (isBusy) return;
  give(settings.criteria[current].key, score);
  const name = settings.criteria[current].name;
  if (current < settings.criteria.length - 1) moveTo(current + 1);
  else moveTo(current);
  byId("status").textContent = `${name} ${score}`;
}

function shiftCurrent(by) {
  const { key } = settings.criteria[current];
  if (isBusy || !(key in scores)) return;
  const score = Math.min(settings.highest, Math.max(settings.lowest, scores[key] + by));
  give(key, score);
  byId("status").textContent = `${settings.criteria[current].name} ${score}`;
}

function connect() {
  for (const holder of document.querySelectorAll("[data-keys]")) {
    holder.append(byId("key-list").content.cloneNode(true));
  }
  byId("who").addEventListener("submit", (event) => {
    event.preventDefault();
    run(() => begin(byId("name").value));
  });
  byId("scores").addEventListener("submit", (event) => {
    event.preventDefault();
    run(advance);
  });
  byId("back").addEventListener("click", () => run(back));
  byId("last").addEventListener("click", () => run(() => show(progress.last)));
  byId("other").addEventListener("click", askName);
  byId("another").addEventListener("click", askName);
  byId("help").addEventListener("click", () => byId("keys").showModal());
  document.addEventListener("keydown", onKey);
  document.addEventListener("visibilitychange", () => {
    if (document.visibilityState === "visible" && !byId("round").hidden) run(lookAgain);
  });
}

connect();
run(async () => {
  await prepare();
  const known = kept.raterOfThisTab() ?? settings.rater;
  if (known === null) askName();
  else await begin(known);
});
