// The two tables: what each run came to, and every change of the size.

import { duration, short, whole } from "./data.js";

// More rows than anyone reads; the text tab has them all.
const MAX_CHANGES = 300;

const last = (run, tag) => {
  const values = run.data.series[tag] ?? [];
  for (let i = values.length - 1; i >= 0; i--) {
    if (values[i] !== null) return values[i];
  }
  return null;
};

const settings = (run) => run.info.settings ?? {};

/** Updates made, and how many times as many the base size would have needed. */
function updates(run) {
  const { base_updates: base, updates: made } = run.info;
  const count = whole(last(run, "progress/updates"));
  const ratio = base / made;
  if (!(ratio >= 1.05)) return count;
  return `${count} (${short(ratio)}× fewer)`;
}

const OVERVIEW = [
  ["run", (run) => name(run)],
  ["policy", (run) => settings(run).policy ?? "–"],
  ["rate rule", (run) => settings(run).learning_rate_scaling ?? "–"],
  [
    "batch size",
    (run) =>
      `${whole(settings(run).base_batch_size)} → ` +
      whole(last(run, "batch_size/global")),
    "number",
  ],
  ["noise scale", (run) => interval(run), "number"],
  ["changes", (run) => whole(run.data.changes.length), "number"],
  [
    "examples/s",
    (run) => short(last(run, "throughput/examples_per_second")),
    "number",
  ],
  ["examples", (run) => short(run.data.steps.at(-1)), "number"],
  ["updates", (run) => updates(run), "number"],
  ["time", (run) => duration(run.data.positions.minutes.at(-1)), "number"],
  ["", (run) => state(run)],
];

const CHANGES = [
  ["run", (run) => name(run)],
  ["epoch", (run, one) => whole(one.epoch + 1), "number"],
  ["examples", (run, one) => whole(one.examples), "number"],
  [
    "batch size",
    (run, one) => `${whole(one.old_batch_size)} → ${whole(one.new_batch_size)}`,
    "number",
  ],
  ["noise scale", (run, one) => short(one.noise_scale), "number"],
  ["learning rate", (run, one) => short(one.learning_rate), "number"],
  ["predicted speed-up", (run, one) => times(one.predicted_speedup), "number"],
  ["observed", (run, one) => times(one.observed_speedup), "number"],
  ["why", (run, one) => one.reason ?? ""],
];

function times(value) {
  return typeof value === "number" ? `${value.toFixed(2)}×` : "–";
}

function interval(run) {
  const value = last(run, "noise_scale/value");
  if (value === null) return "–";
  const low = last(run, "noise_scale/lower");
  const high = last(run, "noise_scale/upper");
  return `${short(value)} (${short(low)} – ${short(high)})`;
}

function state(run) {
  const done = run.info.finished === true;
  const badge = document.createElement("span");
  badge.className = done ? "badge" : "badge live";
  badge.textContent = done ? "finished" : "running";
  // Interrupted: for certain, or because nothing was written for ten minutes.
  const silent = Date.now() / 1000 - run.updated > 600;
  if (!done && (run.info.closed === true || silent)) {
    badge.className = "badge";
    badge.textContent = "stopped";
  }
  return badge;
}

function name(run) {
  const cell = document.createElement("span");
  cell.className = "name";
  const swatch = document.createElement("i");
  swatch.style.background = run.colour;
  cell.append(swatch, run.label);
  return cell;
}

/** Fills a card with the totals of each run. */
export function fillOverview(card, runs) {
  fill(card, "Runs", OVERVIEW, runs.map((run) => [run]));
}

/** Fills a card with the changes of all runs, in the order of examples. */
export function fillChanges(card, runs) {
  const rows = runs.flatMap((run) =>
    run.data.changes.map((change) => [run, change]),
  );
  rows.sort((one, two) => one[1].examples - two[1].examples);
  const shown = rows.slice(-MAX_CHANGES);
  const title =
    rows.length > shown.length
      ? `Changes of the batch size (the last ${shown.length} of ${rows.length})`
      : "Changes of the batch size";
  fill(card, title, CHANGES, shown);
  if (!rows.length) {
    const note = document.createElement("p");
    note.textContent =
      "None so far. The policy has found no reason to, or is still measuring; " +
      "the report's summary says which.";
    card.append(note);
  }
}

function fill(card, title, columns, rows) {
  const heading = document.createElement("h2");
  heading.textContent = title;
  const table = document.createElement("table");
  table.setAttribute("aria-label", title);
  const head = table.createTHead().insertRow();
  for (const [label, , kind] of columns) {
    const cell = document.createElement("th");
    cell.scope = "col";
    cell.textContent = label;
    cell.className = kind ?? "";
    head.append(cell);
  }
  const body = table.createTBody();
  for (const row of rows) {
    const line = body.insertRow();
    for (const [, read, kind] of columns) {
      const cell = line.insertCell();
      cell.className = kind ?? "";
      cell.append(read(...row));
    }
  }
  const scroller = document.createElement("div");
  scroller.className = "scroller";
  scroller.tabIndex = 0;
  scroller.setAttribute("role", "region");
  scroller.setAttribute("aria-label", title);
  scroller.append(table);
  card.replaceChildren(heading, ...(rows.length ? [scroller] : []));
}
