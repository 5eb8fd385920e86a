// Fetching runs, and putting them on the horizontal axis of one's choice.

export const AXES = {
  examples: "examples seen",
  updates: "updates",
  minutes: "minutes of training",
};

/** Fetches JSON from a route of our plugin. */
export async function fetchJson(route) {
  const response = await fetch(route);
  if (!response.ok) {
    throw new Error(`TensorBoard answered ${response.status} to ${route}`);
  }
  return response.json();
}

/** Fetches a run and prepares it; `listed` is its entry in /runs. */
export async function fetchRun(listed) {
  const run = await fetchJson(`run?name=${encodeURIComponent(listed.run)}`);
  run.version = listed.version;
  run.positions = {
    examples: run.steps,
    updates: increasing(run.series["progress/updates"], run.steps),
    minutes: increasing(minutes(run), run.steps),
  };
  return run;
}

function minutes(run) {
  const seconds = run.series["progress/seconds"];
  if (seconds) {
    return seconds.map((one) => (one === null ? null : one / 60));
  }
  return run.times.map((one) => (one - run.times[0]) / 60);
}

/** Fills what is missing and never goes back, so that it can be an axis. */
function increasing(values, fallback) {
  if (!values) return fallback;
  let last = 0;
  return values.map((value) => {
    last = value === null || value < last ? last : value;
    return last;
  });
}

/** Index of the first of increasing numbers that is at least x. */
export function firstAtLeast(numbers, x) {
  let low = 0;
  let high = numbers.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (numbers[middle] < x) low = middle + 1;
    else high = middle;
  }
  return low;
}

/** Where a number of examples is on an axis. */
export function positionOf(run, axis, examples) {
  const { steps } = run;
  const at = run.positions[axis];
  const i = firstAtLeast(steps, examples);
  if (i >= steps.length) return at[at.length - 1];
  const [step, x] = i ? [steps[i - 1], at[i - 1]] : [0, 0];
  const share = (examples - step) / (steps[i] - step || 1);
  return x + share * (at[i] - x);
}

/** Last position of a run on an axis. */
export function endOf(run, axis) {
  const at = run.positions[axis];
  return at.length ? at[at.length - 1] : 0;
}

/**
 * Reads values off at the points of a grid.
 *
 * All runs are drawn on one grid as fine as the screen, so that fifty of them
 * need no common steps. A value belongs to the superbatch that ends at its
 * position. `held` values stay the same in between; others are joined by
 * straight lines, except where `jumps` says that something changed at once.
 * With `isPoint` a value stands for its position only.
 */
export function resample(grid, at, values, { held, jumps, isPoint }) {
  const result = new Array(grid.length).fill(null);
  if (!at.length) return result;
  let i = 0;
  for (let k = 0; k < grid.length; k++) {
    const x = grid[k];
    while (i < at.length && at[i] < x) i++;
    if (i === at.length) {
      // The grid need not meet the end of a run.
      const step = grid.length > 1 ? grid[1] - grid[0] : 0;
      if (x - at[i - 1] < step) result[k] = values[i - 1];
      break;
    }
    const before = i ? values[i - 1] : null;
    if (isPoint && i === 0 && x < at[0]) continue;
    if (held || before === null || values[i] === null || jumps?.[i]) {
      result[k] = values[i];
    } else {
      const span = at[i] - at[i - 1];
      const share = span > 0 ? (x - at[i - 1]) / span : 1;
      result[k] = before + share * (values[i] - before);
    }
  }
  return result;
}

/** Where the batch size differs from that of the point before. */
export function jumpsOf(run) {
  const sizes = run.series["batch_size/global"] ?? [];
  return sizes.map((size, i) => i > 0 && size !== sizes[i - 1]);
}

/** The median of nine values around each; gaps stay gaps. */
export function runningMedian(values) {
  return values.map((value, i) => {
    if (value === null) return null;
    const near = values
      .slice(Math.max(i - 4, 0), i + 5)
      .filter((one) => one !== null)
      .sort((one, two) => one - two);
    return near[near.length >> 1];
  });
}

/** Evenly spaced numbers from low to high. */
export function gridBetween(low, high, count) {
  const step = (high - low) / (count - 1 || 1);
  return Array.from({ length: count }, (_, i) => low + i * step);
}

const SHORT = [
  [1e12, "T"],
  [1e9, "G"],
  [1e6, "M"],
  [1e3, "k"],
];

/** A number in a few digits: 33400 as 33.4k. */
export function short(value) {
  if (!Number.isFinite(value)) return "–";
  for (const [size, letter] of SHORT) {
    if (Math.abs(value) >= size * 0.99995) {
      return `${+(value / size).toPrecision(3)}${letter}`;
    }
  }
  return `${+value.toPrecision(3)}`;
}

/** Minutes as a duration: 0.5 as 30 s, 90 as 1.5 h. */
export function duration(minutes) {
  if (minutes === undefined) return "–";
  if (minutes < 1) return `${+(minutes * 60).toPrecision(2)} s`;
  if (minutes < 60) return `${+minutes.toPrecision(3)} min`;
  return `${+(minutes / 60).toPrecision(3)} h`;
}

/** A count with separators: 33400 as 33,400. */
export function whole(value) {
  if (!Number.isFinite(value)) return "–";
  return Math.round(value).toLocaleString("en-US");
}
