// The page: what is asked, what came of it, and a load.

import { html, nothing, render, svg } from "./lit-html/lit-html.js";
import { loadCharts, ms, stagesOf, timeline } from "./drawing.js";
import { runLoad } from "./load.js";
import { isRight, RefusedError, Server } from "./server.js";

const BUDGET_TICKS = [0.35, 0.5, 0.7, 1, 2, 4]; // of the full median
const SNAP = 0.035; // so near to a tick, in powers of two, the budget is on it
const PRICE_SNAP = 0.6;
const PATIENCE = 20; // with full knobs, in full medians: to be measured, on a slow machine as well
const SAMPLES_PER_TASK = 6;

const server = new Server();
const at = (id) => document.getElementById(id);

const state = {
  model: null, // what /v1/models says
  samples: [],
  samplesProblem: null, // why there are none
  picture: null, // `url`, a data: URL; `name`; `sample` if it is one
  multiple: 1, // the budget, of the full median
  price: null, // the server's own
  isAsking: false,
  isStale: false, // something changed while a request ran
  text: "", // what there is of the answer
  result: null, // of the last answer: `question`, `text`, `pacing`, `roundTripMs`, `verdict`
  problem: null, // or why there is none
  full: null, // what full knobs gave: `key` of the request, and `pacing`, `text` or `problem`
  load: { steps: [], most: 0, stop: null, note: "" }, // `most`: highest load of the run; `stop` ends it
};

// Start ---------------------------------------------------------------------------------------------------------------

async function connect() {
  try {
    state.model = await server.model();
    state.price ??= state.model.pacevlm.default_price;
    at("price").value = state.price;
    at("key-field").hidden = true;
    say("status", `${state.model.id} is ready; its full latency is ${ms(state.model.pacevlm.full_p50_ms)}`);
    at("status").classList.add("ready");
    await getSamples();
  } catch (error) {
    say("status", sentence(error));
    at("status").classList.remove("ready");
    at("key-field").hidden = error.status !== 401;
  }
  draw();
}

async function getSamples() {
  try {
    state.samples = await server.samples();
    if (!state.picture) choose(state.samples[0]);
  } catch (error) {
    state.samplesProblem = error;
  }
}

// Asking --------------------------------------------------------------------------------------------------------------

/** Ask what the page says now; what changes meanwhile is asked afterwards, once. */
async function ask() {
  state.isStale = true;
  if (state.isAsking || !state.model) return;
  state.isAsking = true;
  try {
    while (state.isStale) {
      state.isStale = false;
      await askOnce();
    }
  } finally {
    state.isAsking = false;
    draw();
  }
}

async function askOnce() {
  const { picture } = state;
  const question = at("question").value;
  const fields = { latency_budget_ms: budgetMs(), price: state.price };
  const sentMs = performance.now();
  draw();
  try {
    const onText = (text) => {
      Object.assign(state, { text, problem: null });
      draw();
    };
    const { text, pacing } = await server.ask(picture?.url, question, fields, { onText });
    const roundTripMs = performance.now() - sentMs;
    const references = picture?.sample?.question === question ? picture.sample.references : null;
    state.result = { question, text, pacing, roundTripMs, references };
    Object.assign(state, { text, problem: null });
    speak(`${text}. ${verdict(pacing)[1]}, with ${knobsText(pacing.knobs)}.`);
    draw();
    await askFull(picture, question);
  } catch (error) {
    state.problem = error;
    if (error.status === 401) at("key-field").hidden = false;
  }
  draw();
}

/** What full knobs take for the same request, once for each. */
async function askFull(picture, question) {
  const key = `${question}\n${picture?.url}`;
  if (state.full?.key === key && state.full.pacing) return;
  const { tiers, top_ks, num_blocks, full_p50_ms: fullMs } = state.model.pacevlm;
  const knobs = [tiers, top_ks, num_blocks].map((values) => values.at(-1)).join("/");
  state.full = { key };
  try {
    state.full = { key, ...(await server.ask(picture?.url, question, { knobs, latency_budget_ms: PATIENCE * fullMs })) };
  } catch (error) {
    state.full = { key, problem: error };
  }
}

const budgetMs = () => state.multiple * state.model.pacevlm.full_p50_ms;
const knobsText = (knobs) => `${knobs.tier}/${knobs.top_k}/${knobs.num_blocks}`;

function sentence(error) {
  if (!(error instanceof RefusedError)) throw error;
  return error.message;
}

/** Class and words of how a budget was kept. */
function verdict(pacing) {
  if (!pacing.feasible) return ["late", "Nothing could be promised"];
  if (pacing.budget_met) return ["met", `In time, ${ms(pacing.budget_ms - pacing.measured_ms)} to spare`];
  return ["late", `${ms(pacing.measured_ms - pacing.budget_ms)} late`];
}

// Pictures and questions ----------------------------------------------------------------------------------------------

function choose(sample) {
  if (!sample) return;
  state.picture = { url: sample.image, name: "A sample of the embedded data set", sample };
  at("question").value = sample.question;
  changed();
}

function take(file) {
  if (!file) return;
  const reader = new FileReader();
  reader.addEventListener("load", () => {
    state.picture = { url: reader.result, name: file.name || "A pasted picture", sample: null };
    changed();
  });
  reader.readAsDataURL(file);
}

/** After the first answer every change asks again. */
function changed() {
  draw();
  if (state.result || state.problem) ask();
}

/** One question of each kind: colours and digits aside, no two are alike. */
function kindsOf(samples) {
  const kind = (question) => question.replace(/\b(red|green|blue|yellow|purple|white|\d)\b/g, "_");
  return [...new Map(samples.map(({ question }) => [kind(question), question])).values()];
}

// Drawing -------------------------------------------------------------------------------------------------------------

function draw() {
  drawRequest();
  render(answerView(), at("answer"));
  drawLoad();
}

function drawRequest() {
  const { model, picture, samples } = state;
  at("send").disabled = !model;
  at("send").setAttribute("aria-busy", state.isAsking);
  at("picture").hidden = !picture;
  at("well-hint").classList.toggle("small-hint", Boolean(picture));
  if (picture && at("picture").src !== picture.url) {
    at("picture").src = picture.url;
    at("picture").alt = picture.name;
  }
  if (!model) return;

  const { full_p50_ms: fullMs, default_price: defaultPrice, is_embedded: isEmbedded } = model.pacevlm;
  say("budget-shown", `${ms(budgetMs())}`, `${state.multiple.toFixed(2)} × full`);
  at("budget").setAttribute("aria-valuetext", `${ms(budgetMs())}, ${state.multiple.toFixed(2)} times the full latency`);
  say("price-shown", `${Number(state.price.toFixed(1))}`, state.price === defaultPrice ? "the server’s own" : "points");
  for (const id of ["budget", "price", "most"]) fill(at(id));
  render(BUDGET_TICKS.map((tick) => budgetTick(tick, fullMs)), at("budget-ticks"));

  say("kinds-note", isEmbedded
    ? "The embedded model answers its own kinds of questions only, about pictures like these."
    : "The samples are of the embedded data set, which this model was not made for.");
  render(kindsOf(samples).map((question) => html`<button type="button" class="kind"
    @click=${() => { at("question").value = question; changed(); }}>${question}</button>`), at("kinds"));
  render(samplesView(samples), at("samples"));
}

function samplesView(samples) {
  if (state.samplesProblem) return html`<p class="note wide">There are no samples: ${sentence(state.samplesProblem)}</p>`;
  const tasks = [...new Set(samples.map((sample) => sample.task))];
  return tasks.map((task) => html`<div class="task">${task ?? nothing}</div><div class="row">${samples
    .filter((sample) => sample.task === task)
    .slice(0, SAMPLES_PER_TASK)
    .map((sample) => html`<label class="sample" title=${sample.question}>
      <input class="unseen" type="radio" name="sample" .checked=${state.picture?.sample === sample} @change=${() => choose(sample)}>
      <img src=${sample.image} alt=${sample.question} loading="lazy"></label>`)}</div>`);
}

function budgetTick(tick, fullMs) {
  const input = at("budget");
  const place = `${(100 * (Math.log2(tick) - input.min)) / (input.max - input.min)}%`;
  return svg`<line x1=${place} x2=${place} y1="2" y2="8"></line>
    <text x=${place} y="22" text-anchor="middle">${tick}</text>
    <text class="small" x=${place} y="36" text-anchor="middle">${(tick * fullMs).toFixed(0)}</text>`;
}

function answerView() {
  const { problem, result, text, isAsking } = state;
  if (problem) return problemView(problem);
  if (!result && !isAsking) return html`<p class="blank">The answer appears here, with how it was paced.</p>`;
  const isNew = isAsking && result?.text !== text;
  if (!result) return html`<p class="said">${text || "…"}</p>`;
  const { pacing, references, roundTripMs, question } = result;
  const [kind, words] = verdict(pacing);
  const full = state.full?.pacing;
  const isRightNow = references && isRight(result.text, references);
  return html`<div class="outcome">
    <div class="reply">
      <p class="asked">${question}</p>
      <p class="said">${(isNew ? text : result.text) || "(an empty answer)"}</p>
      ${references ? html`<p class="note">${isRightNow ? "That is right." : `The reference says ${references.join(" or ")}.`}</p>` : nothing}
      <p class=${`verdict ${kind}`}>${words}</p>
      ${pacing.why_infeasible ? html`<p class="note">${pacing.why_infeasible}</p>` : nothing}
      ${meters(pacing.knobs)}
    </div>
    <div class="times">
      ${timeline(pacing, full)}
      <ul class="stages">${stagesOf(pacing).map(([colour, name, stageMs], index) => html`<li><i class=${colour}></i>${name}
        <b>${stageMs.toFixed(1)}</b><span class="of-full">${full ? stagesOf(full)[index][2].toFixed(1) : nothing}</span></li>`)}</ul>
      <p class="note">Milliseconds in the server${full ? ", and with full knobs behind them" : nothing}.
        ${pacing.predicted_ms === null ? nothing : html`Predicted ${ms(pacing.predicted_ms)}`}${pacing.drift_factor > 1.05
          ? html`, on a machine ${pacing.drift_factor.toFixed(2)} × as slow as profiled` : nothing}.
        To this browser and back it took ${ms(roundTripMs)}.</p>
      ${fullNote()}
    </div>
  </div>`;
}

function fullNote() {
  const { full, result } = state;
  if (full?.problem) return html`<p class="problem">Full knobs could not be asked: ${sentence(full.problem)}</p>`;
  if (!full?.pacing) return html`<p class="note">Asking full knobs for the same …</p>`;
  const ratio = full.pacing.answer_ms / result.pacing.answer_ms;
  const same = full.text === result.text ? "Full knobs answered the same" : `Full knobs answered “${full.text}”`;
  return html`<p class="note">${same}, in ${ratio.toFixed(2)} × the time.</p>`;
}

function problemView(problem) {
  const { status, retryAfterS, soonestMs } = problem;
  const fitting = soonestMs && soonestMs / state.model.pacevlm.full_p50_ms;
  return html`<div class="refusal" role="alert">
    <p class="verdict late">${status ? `Refused (${status})` : "No answer"}</p>
    <p class="why">${sentence(problem)}</p>
    ${retryAfterS === null ? nothing : html`<p class="note">Retry-After: ${retryAfterS} s</p>`}
    ${fitting && fitting <= 5 ? html`<button type="button" @click=${() => setMultiple(1.02 * fitting)}>Ask with ${ms(1.02 * soonestMs)}</button>` : nothing}
  </div>`;
}

/** The three knobs, each as a scale that is filled up to what ran. */
function meters(knobs) {
  const { tiers, top_ks, num_blocks } = state.model.pacevlm;
  const scales = [["vision tier", tiers, knobs.tier], ["experts", top_ks, knobs.top_k], ["blocks", num_blocks, knobs.num_blocks]];
  return html`<dl class="knobs" aria-label="Knobs that ran">${scales.map(([name, values, value]) => html`<div>
    <dt>${name}</dt>
    <dd><b>${value}</b><span class="meter" aria-hidden="true">${values.map((_, index) => html`<i
      class=${index <= values.indexOf(value) ? "on" : ""}></i>`)}</span>${value === values.at(-1) ? nothing : html`<span class="note">of ${values.at(-1)}</span>`}</dd>
  </div>`)}</dl>`;
}

function drawLoad() {
  const { steps, stop, note } = state.load;
  const wanted = Number(at("most").value);
  say("most-shown", `${wanted} × capacity`);
  at("most").disabled = Boolean(stop);
  at("load").disabled = !state.samples.length;
  at("load").textContent = stop ? "Stop the load" : "Start the load";
  const fullMs = state.model?.pacevlm.full_p50_ms ?? 1;
  render(loadCharts(steps, steps.length ? state.load.most : wanted, fullMs), at("charts"));
  const capacity = `Capacity is what full knobs answer on the machine as profiled: ${(1e3 / fullMs).toFixed(1)} requests per second.`;
  const last = steps.at(-1);
  const now = last ? `At ${Number(last.load.toFixed(2))} ×: ${last.offered} offered, ${last.accepted} answered, ${last.met} in time, ` +
    `${last.refused} refused${last.failed ? `, ${last.failed} failed` : ""}.` : "";
  say("load-note", state.model ? [now, note, capacity].filter(Boolean).join(" ") : "");
}

function say(id, text, detail) {
  render(detail === undefined ? text : html`<b>${text}</b> ${detail}`, at(id));
}

let speaking;
/** Tell a screen reader, once it has been quiet for a moment: sliders ask many times. */
function speak(text) {
  clearTimeout(speaking);
  speaking = setTimeout(() => say("spoken", text), 400);
}

/** Colour a slider up to its thumb. */
function fill(slider) {
  slider.style.setProperty("--filled", `${(100 * (slider.value - slider.min)) / (slider.max - slider.min)}%`);
}

let isWanted = false;
/** Draw the load at most once a frame. */
function drawSoon() {
  if (isWanted) return;
  isWanted = true;
  requestAnimationFrame(() => {
    isWanted = false;
    drawLoad();
  });
}

// What people do ------------------------------------------------------------------------------------------------------

function setMultiple(multiple) {
  state.multiple = multiple;
  at("budget").value = Math.log2(multiple);
  changed();
}

at("ask").addEventListener("submit", async (event) => {
  event.preventDefault();
  await ask();
  at("answer").scrollIntoView({ block: "nearest" });
});
at("budget").addEventListener("input", ({ target }) => {
  const power = Number(target.value);
  const near = BUDGET_TICKS.find((tick) => Math.abs(Math.log2(tick) - power) < SNAP);
  state.multiple = near ?? 2 ** power;
  changed();
});
at("price").addEventListener("input", ({ target }) => {
  const [price, own] = [Number(target.value), state.model?.pacevlm.default_price];
  state.price = Math.abs(price - own) < PRICE_SNAP ? own : price;
  changed();
});
at("key").addEventListener("change", ({ target }) => {
  server.key = target.value;
  connect();
});
at("file").addEventListener("change", ({ target }) => {
  take(target.files[0]);
  target.value = ""; // so that the same file can be chosen again
});
at("most").addEventListener("input", draw);
at("load").addEventListener("click", async () => {
  const { load, samples, model } = state;
  if (load.stop) {
    load.stop.abort();
    return;
  }
  const fullMs = model.pacevlm.full_p50_ms;
  Object.assign(load, { steps: [], most: Number(at("most").value), stop: new AbortController(), note: "" });
  drawLoad();
  load.note = await runLoad(server, samples, {
    fullMs,
    most: load.most,
    signal: load.stop.signal,
    onChange: (steps) => {
      load.steps = steps;
      drawSoon();
    },
  });
  load.stop = null;
  drawLoad();
});
document.addEventListener("visibilitychange", () => {
  if (document.hidden) state.load.stop?.abort(); // timers of a hidden page are slow, and the load would not be as it says
});
document.addEventListener("paste", ({ clipboardData }) => take([...clipboardData.files].find(({ type }) => type.startsWith("image/"))));
document.addEventListener("dragover", (event) => {
  event.preventDefault();
  at("well").classList.add("over");
});
document.addEventListener("dragleave", () => at("well").classList.remove("over"));
document.addEventListener("drop", (event) => {
  event.preventDefault();
  at("well").classList.remove("over");
  take(event.dataTransfer.files[0]);
});

setMultiple(state.multiple);
connect();
