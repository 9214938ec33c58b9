// The state of the group: asked of the server, and kept up to date by its events.
import { api } from "../../../scripts/api.js";
import { say } from "./words.js";

const BASE = "/cogvideox-xdit";
const listeners = new Set();
const close = new Set();
let state = { state: "absent", ranks: [], warnings: [] };
let timer;
let asking = false;

// Calls a function with each new state, and once with the present one. Returns a function that ends this.
// A group that does nothing is asked every few seconds only for a listener that is closely watched, as the open panel is.
export function watch(listener, { closely = false } = {}) {
  listeners.add(listener);
  if (closely) close.add(listener);
  listener(state);
  schedule(0);
  return () => listeners.delete(listener) && close.delete(listener);
}

export async function refresh() {
  if (asking) return;
  asking = true;
  try {
    const answer = await api.fetchApi(`${BASE}/status`);
    if (answer.ok) {
      state = await answer.json();
      for (const listener of listeners) listener(state);
    }
  } catch {
    // ComfyUI is not there; the front end says so itself
  } finally {
    asking = false;
    const changes = state.job || ["starting", "recovering"].includes(state.state);
    schedule(changes ? 1000 : close.size ? 5000 : 60000);
  }
}

function schedule(milliseconds) {
  clearTimeout(timer);
  if (listeners.size) timer = setTimeout(refresh, milliseconds);
}

// Asks for free, stop or restart. Returns what was done, or why it was not.
export async function act(name) {
  const said = await answerOf(name, { method: "POST" });
  await refresh();
  return said;
}

export async function plans(query) {
  return ask("plans", query);
}

// Returns devices that are there, and plans that fit.
export async function choices(query) {
  return ask("choices", query);
}

async function ask(route, query) {
  return answerOf(`${route}?${new URLSearchParams(query)}`);
}

// Returns what ComfyUI answers, or as an error that it does not.
async function answerOf(path, options) {
  try {
    const answer = await api.fetchApi(`${BASE}/${path}`, options);
    return await answer.json();
  } catch {
    return { error: say("ComfyUI does not answer; try again once it runs") };
  }
}

// Returns the state in a few words, such as "loading 43%" or "sampling 21 of 50".
export function labelOf({ state: name, label, job }) {
  const share = label?.match(/\d+%/)?.[0];
  if (name === "loading" && share) return say("loading {share}", { share });
  if (name === "sampling" && job) return say("sampling {step} of {steps}", job);
  if (name === "upscaling" && job) return say("upscaling {step} of {steps}", job);
  if (name === "recovering" && job) return say("recovering {step} of {steps}", job);
  return say(name);
}

export const logAddress = (rank) => api.apiURL(`${BASE}/log/${rank}`);

api.addEventListener("cogvideox-xdit.progress", ({ detail }) => {
  if (!detail.kind || detail.step < 2) return schedule(0);
  state = { ...state, job: detail, state: { sample: "sampling", upscale: "upscaling" }[detail.kind] ?? state.state };
  for (const listener of listeners) listener(state);
});
api.addEventListener("cogvideox-xdit.line", () => schedule(0));
