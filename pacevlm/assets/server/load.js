// An open-loop load: requests arrive at random times, whatever became of those before them.

import { isRight } from "./server.js";

export const BUDGETS = [1, 1.5, 2, 4]; // of the full median
const NUM_STEPS = 6;
const STEP_S = 4;
const MIN_PER_STEP = 40;
// A browser opens six connections to a server. A seventh request waits for one of them, inside its budget.
const NUM_CONNECTIONS = 6;

/** What became of the requests at one `load`, a multiple of what full knobs can answer. */
export class Step {
  offered = 0;
  accepted = 0;
  met = 0;
  refused = 0;
  failed = 0;
  right = 0;
  answerMs = 0;

  constructor(load) {
    this.load = load;
  }
}

/**
 * Ask samples at rising rates, until all steps are done or `signal` aborts.
 *
 * `fullMs` is the full median, `most` the highest load. `onChange` is called with all steps so far. Returns a sentence if
 * the load could not be what it should be, else "".
 */
export async function runLoad(server, samples, { fullMs, most, signal, onChange }) {
  const steps = [];
  let held = 0;
  for (let number = 1; number <= NUM_STEPS && !signal.aborted; number++) {
    const step = new Step((most * number) / NUM_STEPS);
    steps.push(step);
    held += await runStep(server, samples, step, { fullMs, signal, onChange: () => onChange(steps) });
  }
  const offered = steps.reduce((sum, step) => sum + step.offered, 0);
  return held > 0.05 * offered ? `${held} of ${offered} requests waited for a connection of this browser first.` : "";
}

async function runStep(server, samples, step, { fullMs, signal, onChange }) {
  const meanGapMs = fullMs / step.load;
  const lengthMs = Math.max(STEP_S * 1e3, MIN_PER_STEP * meanGapMs);
  const waiting = [];
  const running = new Set();
  let held = 0;

  const sendNext = () => {
    while (waiting.length && running.size < NUM_CONNECTIONS && !signal.aborted) {
      const { sample, budgetMs, dueMs } = waiting.shift();
      const leftMs = budgetMs - Math.max(performance.now() - dueMs, 0); // timers may be early
      const one = askOne(server, sample, Math.max(leftMs, 0.1), step, signal).finally(() => {
        running.delete(one);
        onChange();
        sendNext();
      });
      running.add(one);
    }
  };

  const startMs = performance.now();
  for (let dueMs = startMs; dueMs < startMs + lengthMs && !signal.aborted; dueMs -= meanGapMs * Math.log(1 - Math.random())) {
    const pauseMs = dueMs - performance.now();
    if (pauseMs > 0) await new Promise((resolve) => setTimeout(resolve, pauseMs));
    step.offered += 1;
    held += Number(running.size >= NUM_CONNECTIONS);
    waiting.push({ sample: pick(samples), budgetMs: pick(BUDGETS) * fullMs, dueMs });
    sendNext();
  }
  while (running.size) await Promise.all(running);
  step.offered -= waiting.length; // those that a stop kept back
  return held;
}

async function askOne(server, sample, budgetMs, step, signal) {
  try {
    const { text, pacing } = await server.ask(sample.image, sample.question, { latency_budget_ms: budgetMs }, { signal });
    step.accepted += 1;
    step.met += Number(pacing.budget_met);
    step.right += Number(isRight(text, sample.references));
    step.answerMs += pacing.answer_ms;
  } catch (error) {
    if (signal.aborted) step.offered -= 1;
    else if ([400, 408, 429].includes(error.status)) step.refused += 1;
    else step.failed += 1;
  }
}

const pick = (list) => list[Math.floor(Math.random() * list.length)];
