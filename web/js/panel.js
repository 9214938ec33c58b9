// The sidebar panel "GPUs": what the group is and does, and buttons to free, stop and start it.
import { app } from "../../../scripts/app.js";
import { bar, element, gib, seconds } from "./elements.js";
import { act, labelOf, logAddress, watch } from "./group.js";
import { planTable } from "./plans.js";
import { say } from "./words.js";

const BUSY = ["starting", "loading", "sampling", "upscaling", "decoding", "encoding", "recovering"];

function heading(state) {
  const kind = state.state === "idle" ? "good" : BUSY.includes(state.state) ? "busy" : "";
  const badge = element("span", { class: `xdit-badge ${kind}` }, labelOf(state));
  return element("div", { class: "xdit-row" }, element("h3", {}, say("xDiT group")), badge);
}

function summary(state) {
  if (!state.plan) return element("div", { class: "xdit-faint" }, say("A job on an xDiT Backend starts a group."));
  const { job } = state;
  const isUpscaling = job?.kind === "upscale", pace = { seconds: job?.step_seconds?.toPrecision(2) };
  const facts = [
    job?.step && (isUpscaling ? say("tile {step} of {steps}", job) : say("step {step} of {steps}", job)),
    job?.step_seconds && (isUpscaling ? say("{seconds} s/tile", pace) : say("{seconds} s/step", pace)),
    job?.seconds_left && say("{time} left", { time: seconds(job.seconds_left) }),
    state.warm_minutes > 0 && say("warm for {minutes} min", { minutes: Math.ceil(state.warm_minutes) }),
    !state.is_group && say("in ComfyUI's own process"),
  ].filter(Boolean);
  return element(
    "div",
    {},
    element("b", {}, say("{plan} on {devices}", state)),
    element("div", { class: "xdit-faint" }, state.why ?? (state.is_group ? say("as set in xDiT Backend") : "")),
    element("div", { class: "xdit-faint" }, facts.join(" · ")),
    job?.steps ? bar(job.step / job.steps, "time") : null,
  );
}

function card(rank, hasLog) {
  const { used, total } = rank.memory;
  return element(
    "div",
    { class: "xdit-card" },
    element("div", { class: "xdit-row" }, element("b", {}, `rank ${rank.rank} · ${rank.device}`), element("span", {}, rank.share)),
    bar(used / total),
    element(
      "div",
      { class: "xdit-row xdit-faint" },
      element("span", {}, `${gib(used)} / ${gib(total)} GiB`),
      hasLog ? element("a", { href: logAddress(rank.rank), target: "_blank" }, say("log ↗")) : null,
    ),
    rank.doing ? element("div", { class: "xdit-faint" }, rank.doing) : null,
  );
}

function details(state) {
  const speed = state.link && { rate: (state.link / 1e9).toPrecision(2), latency: Math.round(state.latency * 1e6) };
  return element(
    "div",
    {},
    ...(state.warnings ?? []).map((line) => element("div", { class: "xdit-note" }, line)),
    state.last_error ? element("div", { class: "xdit-note error" }, say("last error: {error}", { error: state.last_error })) : null,
    speed ? element("div", { class: "xdit-faint" }, say("link {rate} GB/s · {latency} µs", speed)) : null,
  );
}

function render(container) {
  const live = element("div");
  const said = element("div", { class: "xdit-faint xdit-said" });
  const table = element("div");
  const button = (label, name, kind = "") =>
    element("button", { class: `xdit-button ${kind}`, "data-action": name, onclick: async () => tell(await act(name)) }, label);
  const tell = (answer) => (said.textContent = answer.error ?? say(answer.done));
  const showPlans = async () => table.replaceChildren(...(table.firstChild ? [] : [await planTable()]));
  container.replaceChildren(
    element(
      "div",
      { class: "xdit-panel" },
      element("link", { rel: "stylesheet", href: new URL("../panel.css", import.meta.url).href }),
      live,
      element(
        "div",
        { class: "xdit-row xdit-buttons" },
        button(say("Free memory"), "free"),
        button(say("Stop group"), "stop", "danger"),
        button(say("Restart"), "restart"),
        element("button", { class: "xdit-button", "data-action": "plans", onclick: showPlans }, say("Plans…")),
      ),
      said,
      table,
    ),
  );
  const show = (state) =>
    live.replaceChildren(heading(state), summary(state), ...state.ranks.map((rank) => card(rank, state.has_logs)), details(state));
  return watch(show, { closely: true });
}

let leave = () => {};

app.registerExtension({
  name: "CogVideoX-xDiT.Panel",
  setup() {
    app.extensionManager.registerSidebarTab({
      id: "cogvideox-xdit",
      icon: "pi pi-server",
      title: say("GPUs"),
      tooltip: say("The processes of the xDiT group: state, memory, plans"),
      type: "custom",
      render: (container) => {
        leave();
        leave = render(container);
      },
      destroy: () => leave(),
    });
  },
});
