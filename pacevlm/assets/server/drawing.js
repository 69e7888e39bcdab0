// What is drawn of numbers: the times of an answer, and what became of a load.

import { html, nothing, svg } from "./lit-html/lit-html.js";

/** Stages in the order that they run: field of the server's report, name, class of its colour. */
export const STAGES = [
  ["read", "read", "s1"],
  ["prepare", "prepare", "s2"],
  ["stage1", "stage 1", "s3"],
  ["vision", "vision", "s4"],
  ["first_block", "first block", "s5"],
  ["prefill", "prefill", "s6"],
  ["decode", "decode", "s7"],
];

/** Milliseconds as text, as precise as they are worth reading. */
export function ms(value) {
  return value >= 9999.5 ? `${(value / 1e3).toFixed(1)} s` : `${value.toFixed(value < 999.5 ? 1 : 0)} ms`;
}

/** `[class, name, milliseconds]` of all that passed from a request's first byte to its answer. */
export function stagesOf(pacing) {
  const stages = STAGES.map(([field, name, colour]) => [colour, name, pacing.stages[field]]);
  const otherMs = pacing.answer_ms - stages.reduce((sum, [, , stageMs]) => sum + stageMs, 0);
  return [["s0", "queue", pacing.queue_ms], ...stages, ["s8", "between", Math.max(otherMs, 0)]];
}

// The timeline --------------------------------------------------------------------------------------------------------

/** An answer's stages against its budget and its bound, above those of full knobs. */
export function timeline(pacing, full) {
  const { budget_ms: budgetMs, upper_bound_ms: boundMs } = pacing;
  const endMs = 1.04 * Math.max(pacing.measured_ms, budgetMs ?? 0, boundMs ?? 0, full?.measured_ms ?? 0);
  const x = (value) => `${(100 * value) / endMs}%`;
  const anchor = (value) => (value > 0.8 * endMs ? "end" : value < 0.15 * endMs ? "start" : "middle");
  const bar = (stages, y, height) => {
    let atMs = 0;
    return stages.map(([colour, name, stageMs]) => {
      const from = atMs;
      atMs += stageMs;
      return svg`<rect class=${`bar ${colour}`} x=${x(from)} y=${y} width=${x(stageMs)} height=${height}><title>${name} ${ms(stageMs)}</title></rect>`;
    });
  };
  const said = `${ms(pacing.measured_ms)} from the request's first byte to the answer` +
    (budgetMs === null ? "" : `, of a budget of ${ms(budgetMs)}`) + (full ? `; full knobs took ${ms(full.measured_ms)}` : "");
  return html`<svg class="timeline" width="100%" height="190" role="img" aria-label=${said}>
    <defs><pattern id="hatch" width="5" height="5" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">
      <rect class="hatch-ground" width="5" height="5"></rect><rect class="hatch-line" width="2" height="5"></rect>
    </pattern></defs>
    ${ticks(endMs, 6).map((tick) => svg`
      <line class="grid" x1=${x(tick)} x2=${x(tick)} y1="46" y2="160"></line>
      <text class="small" x=${x(tick)} y="178" text-anchor=${tick ? "middle" : "start"}>${tick}</text>`)}
    <text class="small" x="100%" y="178" text-anchor="end">ms</text>
    <text x="0" y="38">This answer <tspan class="strong">${ms(pacing.measured_ms)}</tspan></text>
    ${bar(stagesOf(pacing), 46, 26)}
    <text x="0" y="116">${full ? svg`Full knobs <tspan class="strong">${ms(full.measured_ms)}</tspan>` : nothing}</text>
    ${full ? svg`<g class="ghost">${bar(stagesOf(full), 124, 26)}</g>` : nothing}
    ${budgetMs === null ? nothing : svg`
      <line class="deadline" x1=${x(budgetMs)} x2=${x(budgetMs)} y1="18" y2="160"></line>
      <text class="deadline-text" x=${x(budgetMs)} y="12" text-anchor=${anchor(budgetMs)}>budget ${ms(budgetMs)}</text>`}
    ${boundMs === null ? nothing : svg`
      <line class="bound" x1=${x(boundMs)} x2=${x(boundMs)} y1="42" y2="80"></line>
      <text class="small over-lines" x=${x(boundMs)} y="93" text-anchor=${anchor(boundMs)}>promised ${ms(boundMs)}</text>`}
  </svg>`;
}

/** Round numbers from 0 to below `end`, about `count` of them. */
function ticks(end, count) {
  const rough = end / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((candidate) => candidate >= rough);
  const values = [];
  for (let index = 0; index * step < 0.95 * end; index++) values.push(Number((index * step).toPrecision(6)));
  return values;
}

// Under load ----------------------------------------------------------------------------------------------------------

// Title, what it is a share of, and number and whole of a step; the last one is no share and has no interval.
const CHARTS = [
  ["In time", "of accepted", (step) => [step.met, step.accepted]],
  ["Refused at once", "of offered", (step) => [step.refused, step.offered]],
  ["Right", "of answered", (step) => [step.right, step.accepted]],
  ["Time per answer", "of full latency", (step, fullMs) => [step.answerMs / fullMs, step.accepted]],
];

/** Four small charts of a load's steps, `most` being the highest load of the axis. */
export function loadCharts(steps, most, fullMs) {
  return CHARTS.map(([title, whole, count], index) => {
    const isShare = index < 3;
    const points = steps.map((step) => [step.load, ...count(step, fullMs)]).filter(([, , of]) => of > 0);
    const x = (load) => 4 + (90 * load) / most;
    const y = (share) => 22 + 84 * (1 - Math.min(share, 1.2) / (isShare ? 1 : 1.2));
    const shown = points.length ? `${((100 * points.at(-1)[1]) / points.at(-1)[2]).toFixed(0)} %` : "–";
    const said = points.map(([load, number, of]) => `${((100 * number) / of).toFixed(0)} % at ${load} times capacity`).join(", ");
    return html`<figure class="chart">
      <figcaption><span class="chart-title">${title}</span><span class="chart-value">${shown}</span><span class="chart-whole">${whole}</span></figcaption>
      <svg width="100%" height="132" role="img" aria-label=${`${title}, ${whole}: ${said || "nothing yet"}`}>
        ${[0, 0.5, 1].map((share) => svg`<line class="grid" x1="0" x2="100%" y1=${y(share)} y2=${y(share)}></line>
          <text class="small" x="0" y=${y(share) - 4}>${100 * share}</text>`)}
        ${[0, 1, 2, 3, 4].filter((load) => load <= most).map((load) => svg`
          <text class="small" x=${`${x(load)}%`} y="126" text-anchor="middle">${load ? `${load}×` : "0"}</text>`)}
        ${points.slice(1).map(([load, number, of], before) => svg`<line class="curve"
          x1=${`${x(points[before][0])}%`} y1=${y(points[before][1] / points[before][2])} x2=${`${x(load)}%`} y2=${y(number / of)}></line>`)}
        ${points.map(([load, number, of]) => svg`
          ${isShare ? whisker(x(load), ...wilson(number, of).map(y)) : nothing}
          <circle class="point" cx=${`${x(load)}%`} cy=${y(number / of)} r="4"></circle>`)}
      </svg>
    </figure>`;
  });
}

const whisker = (x, low, high) => svg`<line class="whisker" x1=${`${x}%`} x2=${`${x}%`} y1=${low} y2=${high}></line>`;

/** 95 % interval of a share, after Wilson (1927). */
function wilson(number, of) {
  const [z, share] = [1.96, number / of];
  const middle = share + z ** 2 / (2 * of);
  const spread = z * Math.sqrt((share * (1 - share)) / of + z ** 2 / (4 * of ** 2));
  return [(middle - spread) / (1 + z ** 2 / of), (middle + spread) / (1 + z ** 2 / of)];
}
