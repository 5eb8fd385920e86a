// The tab "Batch size": loads what it needs, asks for news, shows them.

import { CHARTS, Chart, hasData } from "./charts.js";
import { AXES, fetchJson, fetchRun } from "./data.js";
import { fillChanges, fillOverview } from "./tables.js";

const SECONDS_BETWEEN_LOOKS = 5;
// So many runs are shown at first: those that were written to last.
const RUNS_AT_FIRST = 8;
const STORED = "keras_batchsize";

// In both themes told apart by people who see colours differently.
const COLOURS = {
  light: [
    "#0067b1", "#e4572e", "#008a6c", "#a23b9c", "#b07900",
    "#0aa2c0", "#c2185b", "#5d7a00", "#6650c7", "#7a5c48",
  ],
  dark: [
    "#5db4ff", "#ff8a65", "#3ddcb0", "#e08be0", "#ffcc5c",
    "#4dd9f0", "#ff80ab", "#b5d84c", "#b39dff", "#cbb0a0",
  ],
};

const state = {
  axis: "examples",
  zoom: null,
  runs: new Map(),
  chosen: {},
  loaded: false,
  filter: "",
};

/** Called by TensorBoard once, in the frame of the tab. */
export async function render() {
  document.title = "Batch size";
  await Promise.all([
    loadStyle("uPlot.min.css"),
    loadStyle("style.css"),
    loadScript("uPlot.iife.min.js"),
  ]);
  restore();
  followTheme();
  build();
  await look();
  setInterval(lookIfSeen, SECONDS_BETWEEN_LOOKS * 1000);
  document.addEventListener("visibilitychange", lookIfSeen);
  new ResizeObserver(draw).observe(page.cards);
}

const url = (file) => new URL(file, import.meta.url).href;

function loadStyle(file) {
  const link = document.createElement("link");
  link.rel = "stylesheet";
  link.href = url(file);
  return added(link);
}

function loadScript(file) {
  const script = document.createElement("script");
  script.src = url(file);
  return added(script);
}

function added(node) {
  return new Promise((resolve, reject) => {
    node.onload = resolve;
    node.onerror = () => reject(new Error(`could not load ${node.src}`));
    document.head.append(node);
  });
}

// What the user chose outlives a reload of the page.

function restore() {
  try {
    const stored = JSON.parse(localStorage.getItem(STORED)) ?? {};
    if (stored.axis in AXES) state.axis = stored.axis;
    state.chosen = stored.chosen ?? {};
  } catch {
    // Storage may be forbidden; then choices last as long as the page.
  }
}

function store() {
  const { axis, chosen } = state;
  try {
    localStorage.setItem(STORED, JSON.stringify({ axis, chosen }));
  } catch {
    // As above.
  }
}

/** TensorBoard marks its own body; a media query would not see its button. */
function followTheme() {
  const outer = parent.document.body;
  const apply = () => {
    document.body.classList.toggle(
      "dark",
      outer.classList.contains("dark-mode"),
    );
    draw();
  };
  apply();
  const options = { attributes: true, attributeFilter: ["class"] };
  new MutationObserver(apply).observe(outer, options);
}

function palette() {
  const dark = document.body.classList.contains("dark");
  return COLOURS[dark ? "dark" : "light"];
}

// The page.

const page = {};

function node(name, properties = {}, ...children) {
  const result = document.createElement(name);
  Object.assign(result, properties);
  result.append(...children);
  return result;
}

function build() {
  page.axes = node("fieldset", {}, node("legend", { textContent: "Horizontal axis" }));
  for (const [axis, label] of Object.entries(AXES)) {
    const input = node("input", {
      type: "radio",
      name: "axis",
      value: axis,
      checked: axis === state.axis,
      onchange: () => {
        state.axis = axis;
        state.zoom = null;
        store();
        draw();
      },
    });
    page.axes.append(node("label", {}, input, label));
  }
  page.filter = node("input", {
    type: "search",
    placeholder: "Filter runs",
    ariaLabel: "Filter runs by name",
    oninput: () => {
      state.filter = page.filter.value;
      listRuns();
    },
  });
  const choose = (checked) => () => {
    for (const run of matching()) state.chosen[run.name] = checked;
    store();
    listRuns();
    load();
  };
  page.list = node("div", { className: "runs" });
  page.runs = node(
    "fieldset",
    {},
    node("legend", { textContent: "Runs" }),
    page.filter,
    node(
      "div",
      { className: "buttons" },
      node("button", { type: "button", textContent: "All", onclick: choose(true) }),
      node("button", { type: "button", textContent: "None", onclick: choose(false) }),
      node("button", { type: "button", textContent: "Reload", onclick: look }),
    ),
    page.list,
  );
  page.whole = node("button", {
    type: "button",
    textContent: "Show the whole training",
    hidden: true,
    onclick: () => zoomTo(null),
  });
  page.status = node("p", { className: "status", role: "status" });
  page.live = node("p", { className: "hidden", ariaLive: "polite" });
  page.side = node(
    "nav",
    { ariaLabel: "Axis and runs" },
    page.axes,
    page.runs,
    page.whole,
    page.status,
  );
  page.overview = node("section", { className: "card wide", id: "overview" });
  page.changes = node("section", { className: "card wide", id: "changes" });
  page.empty = node("section", { className: "empty", hidden: true });
  page.cards = node("div", { className: "cards" });
  const announce = (text) => (page.live.textContent = text);
  page.charts = CHARTS.map((spec) => new Chart(spec, zoomTo, announce));
  page.cards.append(
    page.overview,
    ...page.charts.map((chart) => chart.element),
    page.changes,
  );
  page.main = node("main", {}, page.empty, page.cards);
  document.body.append(page.side, page.main, page.live);
}

function zoomTo(zoom) {
  state.zoom = zoom;
  draw();
}

// News.

function lookIfSeen() {
  // TensorBoard keeps the frames of other tabs, without any size.
  const seen = document.documentElement.clientWidth > 0;
  if (seen && document.visibilityState === "visible") look();
}

async function look() {
  if (state.looking) return;
  state.looking = true;
  try {
    const before = [...state.runs.keys()].join();
    takeOver(await fetchJson("runs"));
    listRuns();
    // Fifty runs take a while to draw: not again where nothing is new.
    const isNew = before !== [...state.runs.keys()].join();
    await load(isNew || !state.loaded);
    page.status.textContent = "";
  } catch (error) {
    page.status.textContent = `No news: ${error.message}. Trying again.`;
  } finally {
    state.looking = false;
    state.loaded = true;
  }
}

function takeOver(listed) {
  const known = state.runs;
  state.runs = new Map();
  for (const one of listed) {
    const before = known.get(one.run) ?? { name: one.run, data: null };
    const info = one.info ?? {};
    state.runs.set(one.run, { ...before, listed: one, info, updated: one.updated });
  }
  const latest = [...state.runs.values()]
    .sort((one, two) => two.updated - one.updated)
    .slice(0, RUNS_AT_FIRST);
  for (const run of state.runs.values()) {
    run.label = labelOf(run.name);
    run.atFirst = latest.includes(run);
  }
}

/** Without the folder that all of our runs are in. */
function labelOf(name) {
  const parts = name.split("/");
  const number = /^batch_size(?:_(\d+))?$/.exec(parts.at(-1));
  if (!number) return name;
  const folder = parts.slice(0, -1).join("/") || "training";
  return number[1] ? `${folder} (${number[1]})` : folder;
}

const isChosen = (run) => state.chosen[run.name] ?? run.atFirst;

/** Fetches what is chosen and new; some at a time, shown as they come. */
async function load(draws = true) {
  const wanted = [...state.runs.values()].filter(
    (run) => isChosen(run) && run.data?.version !== run.listed.version,
  );
  const hasNews = wanted.length > 0;
  const fetchNext = async () => {
    for (let run = wanted.pop(); run; run = wanted.pop()) {
      const data = await fetchRun(run.listed);
      const current = state.runs.get(run.name);
      if (current) current.data = data;
    }
  };
  await Promise.all([1, 2, 3, 4].map(fetchNext));
  if (draws || hasNews) draw();
}

// Drawing.

function matching() {
  const wanted = state.filter.toLowerCase();
  return [...state.runs.values()].filter((run) =>
    run.label.toLowerCase().includes(wanted),
  );
}

function paint() {
  const colours = palette();
  [...state.runs.values()].forEach((run, index) => {
    run.colour = colours[index % colours.length];
  });
}

function listRuns() {
  paint();
  const focused = document.activeElement?.value;
  page.list.replaceChildren(
    ...matching().map((run) => {
      const input = node("input", {
        type: "checkbox",
        value: run.name,
        checked: isChosen(run),
        onchange: () => {
          state.chosen[run.name] = input.checked;
          store();
          load();
        },
      });
      input.style.accentColor = run.colour;
      const { settings = {} } = run.info;
      const detail = [settings.policy, settings.learning_rate_scaling];
      return node(
        "label",
        { title: run.name },
        input,
        node(
          "span",
          {},
          run.label,
          node("small", { textContent: detail.filter(Boolean).join(", ") }),
        ),
      );
    }),
  );
  // The list was made anew under the hands of a keyboard user.
  for (const input of page.list.querySelectorAll("input")) {
    if (input.value === focused) input.focus();
  }
}

let asked = false;

/** Draws once, however often it is asked for before the next frame. */
function draw() {
  if (asked || !page.main) return;
  asked = true;
  requestAnimationFrame(() => {
    asked = false;
    drawNow();
  });
}

function drawNow() {
  paint();
  const runs = [...state.runs.values()].filter(
    (run) => isChosen(run) && run.data?.steps.length,
  );
  page.cards.hidden = !runs.length;
  page.whole.hidden = !state.zoom;
  showEmpty(runs);
  if (!runs.length) return;
  fillOverview(page.overview, runs);
  for (const chart of page.charts) {
    chart.element.hidden = !hasData(chart.spec, runs);
    if (!chart.element.hidden) {
      chart.show(runs, state.axis, AXES[state.axis], state.zoom);
    }
  }
  fillChanges(page.changes, runs);
}

/** Says what to do where there is nothing to show. */
function showEmpty(runs) {
  page.empty.hidden = runs.length > 0 || !state.loaded;
  if (page.empty.hidden) return;
  const [title, text, code] = state.runs.size
    ? [
        "Choose a run",
        "None of the runs on the left is chosen, or those that are have not " +
          "trained on a superbatch yet.",
        "",
      ]
    : [
        "No batch sizes here yet",
        "This folder holds no training that keras_batchsize has written. " +
          "Train with a folder for TensorBoard, and give TensorBoard the " +
          "same one:",
        'trainer = kb.AdaptiveTrainer(model, tensorboard="logs")\n' +
          "trainer.fit(x, y, batch_size=32, epochs=20)\n\n" +
          "tensorboard --logdir logs",
      ];
  page.empty.replaceChildren(
    node("h2", { textContent: title }),
    node("p", { textContent: text }),
    ...(code ? [node("pre", { textContent: code })] : []),
    node("p", {
      textContent: `This page looks again every ${SECONDS_BETWEEN_LOOKS} seconds.`,
    }),
  );
}
