// One card per question; uPlot draws it. What a card shows is listed in CHARTS.

import { endOf, gridBetween, jumpsOf, positionOf, resample } from "./data.js";
import { runningMedian, short, whole } from "./data.js";

const MEGABYTE = 1e6;
const HEIGHT = 250;
// With more runs than this, bands and marks would hide the lines.
const FEW_RUNS = 4;
const TOOLTIP_RUNS = 8;
const MAX_DOTS = 25;

/**
 * A line: `tag` it reads, or `loss` of Keras; `label`; `width` and `dash` in
 * pixels; `part` of its opacity; `held` where a value lasts until the next one;
 * `smooth` where single values are ragged; `loose` where the most extreme
 * values may leave the chart; `quiet` where it need not be read out.
 */
export const CHARTS = [
  {
    id: "size",
    title: "Batch size and noise scale",
    unit: "examples, log scale",
    log: true,
    format: whole,
    band: ["noise_scale/lower", "noise_scale/upper"],
    bandLabel: "95 % interval",
    lines: [
      { tag: "batch_size/global", label: "batch size", width: 2.5, held: true },
      { tag: "noise_scale/value", label: "noise scale", width: 1.25, loose: true },
      { tag: "batch_size/maximum", label: "maximum", width: 1, dash: [2, 4], held: true, quiet: true },
    ],
  },
  {
    id: "rate",
    title: "Learning rate",
    unit: "",
    zero: true,
    format: short,
    lines: [
      { tag: "learning_rate/effective", label: "effective", width: 2 },
      { tag: "learning_rate/base", label: "without the factor", width: 1.25, dash: [6, 4] },
    ],
  },
  {
    id: "speed",
    title: "Speed and goodput",
    unit: "examples per second, running median",
    zero: true,
    format: short,
    lines: [
      { tag: "throughput/goodput", label: "goodput", width: 2.25 },
      { tag: "throughput/examples_per_second", label: "examples/s", width: 1, part: 0.65, loose: true, smooth: true },
    ],
  },
  {
    id: "memory",
    title: "Memory",
    unit: "MB",
    zero: true,
    scale: 1 / MEGABYTE,
    format: short,
    lines: [
      { tag: "memory/peak_bytes", label: "peak", width: 2, held: true },
      { tag: "memory/limit_bytes", label: "limit", width: 1, dash: [2, 4], held: true },
    ],
  },
  {
    id: "loss",
    title: "Loss",
    dots: true,
    unit: "at the ends of epochs, from Keras",
    format: short,
    lines: [
      { loss: "loss", label: "training", width: 2 },
      { loss: "validation_loss", label: "validation", width: 1.5, dash: [6, 4] },
    ],
  },
];

/** The values of a line in a run: positions on the axis and numbers. */
function pointsOf(run, axis, line) {
  if (line.loss) {
    const [steps, values] = run[line.loss] ?? [[], []];
    return { at: steps.map((one) => positionOf(run, axis, one)), values };
  }
  const values = run.series[line.tag];
  if (!values) return { at: [], values: [] };
  return {
    at: run.positions[axis],
    values: line.smooth ? smooth(values) : values,
  };
}

/** Whether any run has anything to show in a chart. */
export function hasData(chart, runs) {
  return runs.some(({ data }) =>
    chart.lines.some((line) =>
      line.loss
        ? data[line.loss]
        : data.series[line.tag]?.some((value) => value !== null),
    ),
  );
}

/** Smallest and largest value, without a share of them at either end. */
function extremes(values, share) {
  const known = values.filter((one) => one !== null);
  if (!share) {
    return known.reduce(
      ([low, high], one) => [Math.min(low, one), Math.max(high, one)],
      [Infinity, -Infinity],
    );
  }
  if (!known.length) return [Infinity, -Infinity];
  const sorted = Float64Array.from(known).sort();
  const cut = Math.round(share * (sorted.length - 1));
  return [sorted[cut], sorted[sorted.length - 1 - cut]];
}

const smoothed = new WeakMap();

/** The running median, computed once for each run that was fetched. */
function smooth(values) {
  if (!smoothed.has(values)) smoothed.set(values, runningMedian(values));
  return smoothed.get(values);
}

function colour(name) {
  return getComputedStyle(document.body).getPropertyValue(name).trim();
}

export class Chart {
  /**
   * @param {object} spec An entry of CHARTS.
   * @param {function} onZoom Called with [low, high] or null.
   * @param {function} announce Called with a text for screen readers.
   */
  constructor(spec, onZoom, announce) {
    this.spec = spec;
    this.onZoom = onZoom;
    this.announce = announce;
    this.plot = null;
    this.runs = [];
    this.element = this._card();
  }

  _card() {
    const card = document.createElement("section");
    card.className = "card";
    card.id = `card-${this.spec.id}`;
    const title = document.createElement("h2");
    title.id = `title-${this.spec.id}`;
    title.textContent = this.spec.title;
    const unit = document.createElement("small");
    unit.textContent = this.spec.unit;
    title.append(" ", unit);
    card.setAttribute("aria-labelledby", title.id);
    this.holder = document.createElement("div");
    this.holder.className = "plot";
    this.holder.tabIndex = 0;
    this.holder.setAttribute("role", "img");
    this.holder.addEventListener("keydown", (event) => this._onKey(event));
    this.tooltip = document.createElement("div");
    this.tooltip.className = "tooltip";
    this.tooltip.hidden = true;
    card.append(title, this._legend(), this.holder);
    return card;
  }

  /** What the strokes mean; colours are those of the runs. */
  _legend() {
    const list = document.createElement("ul");
    list.className = "legend";
    for (const line of this.spec.lines) {
      list.append(legendEntry(line.label, line));
    }
    if (this.spec.band) list.append(legendEntry(this.spec.bandLabel, null));
    return list;
  }

  /** Draws the runs: a list of {name, label, colour, data}. */
  show(runs, axis, axisLabel, zoom) {
    this.runs = runs;
    this.axis = axis;
    const width = Math.max(this.holder.clientWidth, 100);
    const [low, high] = zoom ?? [
      0,
      Math.max(...runs.map((run) => endOf(run.data, axis)), 1e-9),
    ];
    const fine = runs.length <= FEW_RUNS ? 2 : 1;
    const grid = gridBetween(low, high, Math.min(width * fine, 1600));
    const data = [grid];
    this.columns = [];
    for (const run of runs) this._addRun(run, grid, data);
    this.range = this._range(data);
    // A new plot only where its lines differ; new numbers are cheap.
    const key = JSON.stringify([
      runs.map((run) => [run.name, run.colour]),
      axisLabel,
      document.body.className,
    ]);
    if (this.plot && this.key === key) {
      this.plot.setSize({ width, height: HEIGHT });
      this.plot.setData(data);
    } else {
      this.plot?.destroy();
      this.plot = new uPlot(this._options(width, axisLabel), data, this.holder);
      this.plot.over.append(this.tooltip);
      this.key = key;
    }
    this.holder.setAttribute("aria-label", this._summary());
  }

  _addRun(run, grid, data) {
    const { lines, band, scale = 1 } = this.spec;
    const jumps = jumpsOf(run.data);
    const add = (line, kind) => {
      const { at, values } = pointsOf(run.data, this.axis, line);
      const scaled = scale === 1 ? values : values.map((one) => one && one * scale);
      const positive = this.spec.log
        ? scaled.map((one) => (one > 0 ? one : null))
        : scaled;
      // A loss stands at the end of an epoch, not for all of it.
      const how = line.loss ? { isPoint: true } : { held: line.held, jumps };
      data.push(resample(grid, at, positive, how));
      this.columns.push({ run, line, kind, index: data.length - 1 });
    };
    if (band) {
      add({ tag: band[1] }, "upper");
      add({ tag: band[0] }, "lower");
    }
    // The first line is the most important one: it is drawn last.
    for (const line of [...lines].reverse()) add(line, "line");
  }

  _options(width, axisLabel) {
    const few = this.runs.length <= FEW_RUNS;
    const series = [{}];
    const bands = [];
    for (const { run, line, kind, index } of this.columns) {
      if (kind === "line") {
        series.push({
          stroke: withAlpha(run.colour, line.part ?? 1),
          width: few ? line.width : Math.max(line.width * 0.7, 1),
          dash: line.dash,
          points: { show: false },
        });
      } else {
        series.push({ stroke: "transparent", width: 0, points: { show: false } });
        if (kind === "lower" && few) {
          bands.push({
            series: [index - 1, index],
            fill: withAlpha(run.colour, 0.14),
          });
        }
      }
    }
    const text = colour("--muted");
    const grid = { stroke: colour("--grid"), width: 1 };
    const font = "11px Roboto, 'Segoe UI', Helvetica, Arial, sans-serif";
    const axis = { stroke: text, grid, ticks: { show: false }, font };
    return {
      width,
      height: HEIGHT,
      padding: [10, 14, 0, 0],
      legend: { show: false },
      cursor: {
        sync: { key: "batch-size", scales: ["x", null], setSeries: false },
        points: { size: 7 },
        drag: { x: true, y: false, setScale: false },
        focus: { prox: 24 },
      },
      focus: { alpha: 1 },
      scales: {
        x: { time: false, range: (plot, low, high) => [low, high] },
        y: {
          distr: this.spec.log ? 3 : 1,
          log: 2,
          range: () => this.range,
        },
      },
      series,
      bands,
      axes: [
        {
          ...axis,
          label: axisLabel,
          labelSize: 18,
          labelFont: font,
          size: 28,
          values: (plot, values) => values.map(short),
        },
        {
          ...axis,
          size: 52,
          filter: (plot, splits) => splits,
          splits: this.spec.log ? powersOfTwo : undefined,
          values: (plot, values) =>
            values.map((one) => (this.spec.log ? whole(one) : short(one))),
        },
      ],
      hooks: {
        drawAxes: [(plot) => this._drawMarks(plot)],
        draw: [(plot) => this.spec.dots && this._drawDots(plot)],
        setCursor: [(plot) => this._onCursor(plot)],
        setSelect: [(plot) => this._onSelect(plot)],
        ready: [
          (plot) =>
            plot.over.addEventListener("dblclick", () => this.onZoom(null)),
        ],
      },
    };
  }

  /** Range of the vertical axis; outliers of `loose` lines may leave it. */
  _range(data) {
    let low = Infinity;
    let high = -Infinity;
    for (const { line, kind, index } of this.columns) {
      if (kind !== "line") continue;
      const [least, most] = extremes(data[index], line.loose ? 0.02 : 0);
      low = Math.min(low, least);
      high = Math.max(high, most);
    }
    if (low > high) return this.spec.log ? [1, 2] : [0, 1];
    if (this.spec.log) return [low / 1.35, high * 1.35];
    const bottom = this.spec.zero ? 0 : low - 0.06 * (high - low);
    const top = high + 0.06 * (high - bottom);
    if (top > bottom) return [bottom, top];
    const room = Math.abs(high) / 10 || 1; // A single value, or a flat line.
    return [bottom - room, top + room];
  }

  /** A mark at each change of the size: a line, or a tick with many runs. */
  _drawMarks(plot) {
    const { ctx, bbox } = plot;
    const ratio = window.devicePixelRatio || 1;
    const few = this.runs.length <= FEW_RUNS;
    ctx.save();
    ctx.lineWidth = ratio;
    for (const run of this.runs) {
      ctx.strokeStyle = withAlpha(run.colour, 0.55);
      ctx.setLineDash(few ? [2 * ratio, 3 * ratio] : []);
      for (const change of run.data.changes) {
        const x = positionOf(run.data, this.axis, change.examples);
        const { min, max } = plot.scales.x;
        if (x < min || x > max) continue;
        const left = Math.round(plot.valToPos(x, "x", true)) + 0.5;
        const bottom = bbox.top + bbox.height;
        ctx.beginPath();
        ctx.moveTo(left, few ? bbox.top : bottom - 8 * ratio);
        ctx.lineTo(left, bottom);
        ctx.stroke();
      }
    }
    ctx.restore();
  }

  /** The points themselves, where they are few; one alone makes no line. */
  _drawDots(plot) {
    const { ctx } = plot;
    const radius = 2.2 * (window.devicePixelRatio || 1);
    const { min, max } = plot.scales.x;
    ctx.save();
    for (const { run, line } of this.columns) {
      const { at, values } = pointsOf(run.data, this.axis, line);
      if (at.length > MAX_DOTS) continue;
      ctx.fillStyle = run.colour;
      at.forEach((x, i) => {
        if (values[i] === null || x < min || x > max) return;
        ctx.beginPath();
        const left = plot.valToPos(x, "x", true);
        const top = plot.valToPos(values[i], "y", true);
        ctx.arc(left, top, radius, 0, 2 * Math.PI);
        ctx.fill();
      });
    }
    ctx.restore();
  }

  _onSelect(plot) {
    const { left, width } = plot.select;
    if (width < 5) return;
    const zoom = [left, left + width].map((one) => plot.posToVal(one, "x"));
    plot.setSelect({ left: 0, top: 0, width: 0, height: 0 }, false);
    this.onZoom(zoom);
  }

  /** Values at the cursor, of the runs that are nearest to it. */
  _onCursor(plot) {
    const { idx, left, top } = plot.cursor;
    const here = plot.over.matches(":hover") || this.fromKeyboard;
    if (!here || idx === null || idx === undefined || left < 0) {
      this.tooltip.hidden = true;
      return;
    }
    const rows = this._values(plot, idx, top);
    this.tooltip.replaceChildren(
      element("strong", `${short(plot.data[0][idx])} ${this.axis}`),
      ...rows.slice(0, TOOLTIP_RUNS).map(({ run, text }) => {
        const row = element("div", "");
        const swatch = element("i", "");
        swatch.style.background = run.colour;
        row.append(swatch, element("span", run.label), element("b", text));
        return row;
      }),
    );
    if (rows.length > TOOLTIP_RUNS) {
      const more = rows.length - TOOLTIP_RUNS;
      this.tooltip.append(element("em", `and ${more} more`));
    }
    this.tooltip.hidden = !rows.length;
    const right = left > plot.over.clientWidth / 2;
    this.tooltip.style.left = right ? "" : `${left + 14}px`;
    this.tooltip.style.right = right
      ? `${plot.over.clientWidth - left + 14}px`
      : "";
  }

  _values(plot, idx, top) {
    const rows = [];
    for (const run of this.runs) {
      const parts = [];
      let distance = Infinity;
      for (const { run: owner, line, kind, index } of this.columns) {
        const value = plot.data[index][idx];
        if (owner !== run || kind !== "line" || value === null) continue;
        if (line.quiet) continue;
        parts.unshift(`${line.label} ${this.spec.format(value)}`);
        distance = Math.abs(plot.valToPos(value, "y") - top);
      }
      if (parts.length) rows.push({ run, text: parts.join(" · "), distance });
    }
    if (rows.length > TOOLTIP_RUNS) {
      rows.sort((one, two) => one.distance - two.distance);
    }
    return rows;
  }

  /** Arrow keys move the cursor, + and - zoom, 0 and Escape show all. */
  _onKey(event) {
    const { plot } = this;
    if (!plot) return;
    const last = plot.data[0].length - 1;
    const big = Math.round(last / 20);
    const now = plot.cursor.idx ?? 0;
    const moves = {
      ArrowLeft: now - (event.shiftKey ? 1 : big),
      ArrowRight: now + (event.shiftKey ? 1 : big),
      Home: 0,
      End: last,
    };
    if (event.key in moves) {
      const index = Math.min(Math.max(moves[event.key], 0), last);
      this.fromKeyboard = true;
      const left = plot.valToPos(plot.data[0][index], "x");
      plot.setCursor({ left, top: plot.over.clientHeight / 2 });
      this.announce(this._reading(index));
      this.fromKeyboard = false;
    } else if (event.key === "+" || event.key === "-") {
      this._zoomBy(plot, event.key === "+" ? 0.5 : 2, now);
    } else if (event.key === "0" || event.key === "Escape") {
      this.onZoom(null);
    } else {
      return;
    }
    event.preventDefault();
  }

  _zoomBy(plot, factor, index) {
    const { min, max } = plot.scales.x;
    const centre = plot.data[0][index];
    const low = Math.max(centre - (centre - min) * factor, 0);
    const high = centre + (max - centre) * factor;
    const end = Math.max(...this.runs.map((run) => endOf(run.data, this.axis)));
    this.onZoom(low <= 0 && high >= end ? null : [low, Math.min(high, end)]);
  }

  _reading(index) {
    const at = `${short(this.plot.data[0][index])} ${this.axis}`;
    const rows = this._values(this.plot, index, 0).slice(0, TOOLTIP_RUNS);
    const texts = rows.map(({ run, text }) => `${run.label}: ${text}`);
    return `${at}. ${texts.join(". ")}`;
  }

  _summary() {
    const last = this.plot.data[0].length - 1;
    return (
      `${this.spec.title} of ${this.runs.length} runs. ` +
      `At the end: ${this._reading(last)}. Arrow keys read values, ` +
      "plus and minus zoom, 0 shows all."
    );
  }
}

/** Powers of two within a range, at most nine of them. */
function powersOfTwo(plot, axis, low, high) {
  const first = Math.ceil(Math.log2(low));
  const last = Math.floor(Math.log2(high));
  const step = Math.max(Math.ceil((last - first + 1) / 9), 1);
  const result = [];
  for (let k = first; k <= last; k += step) result.push(2 ** k);
  return result;
}

function withAlpha(hex, alpha) {
  const value = Math.round(alpha * 255);
  return hex + value.toString(16).padStart(2, "0");
}

function element(name, text) {
  const result = document.createElement(name);
  result.textContent = text;
  return result;
}

/** A short stroke in the style of a line, or a filled box for a band. */
function legendEntry(label, line) {
  const svg = "http://www.w3.org/2000/svg";
  const image = document.createElementNS(svg, "svg");
  image.setAttribute("width", "26");
  image.setAttribute("height", "10");
  image.setAttribute("aria-hidden", "true");
  const shape = document.createElementNS(svg, line ? "path" : "rect");
  const attributes = line
    ? {
        d: "M1 5H25",
        stroke: "currentColor",
        "stroke-width": line.width,
        "stroke-dasharray": (line.dash ?? []).join(" "),
        "stroke-opacity": line.part ?? 1,
      }
    : { width: 26, height: 10, rx: 2, fill: "currentColor", "fill-opacity": 0.2 };
  for (const [name, value] of Object.entries(attributes)) {
    shape.setAttribute(name, value);
  }
  image.append(shape);
  const entry = document.createElement("li");
  entry.append(image, label);
  return entry;
}
