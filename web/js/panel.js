// The sidebar panel "GPUs": what the group is and does, and buttons to free, stop and start it.
import { app } from "../../../scripts/app.js";
import { bar, element, gib, seconds } from "./elements.js";
import { act, logAddress, watch } from "./group.js";
import { planTable } from "./plans.js";

const BUSY = ["starting", "loading", "sampling", "decoding", "encoding", "recovering"];

function heading(state) {
  const kind = state.state === "idle" ? "good" : BUSY.includes(state.state) ? "busy" : "";
  return element("div", { class: "xdit-row" }, element("h3", {}, "xDiT group"), element("span", { class: `xdit-badge ${kind}` }, state.label));
}

function summary(state) {
  if (!state.plan) return element("div", { class: "xdit-faint" }, "A job on an xDiT Backend starts a group.");
  const { job } = state;
  const facts = [
    job?.step && `step ${job.step} of ${job.steps}`,
    job?.step_seconds && `${job.step_seconds.toPrecision(2)} s/step`,
    job?.seconds_left && `${seconds(job.seconds_left)} left`,
    state.warm_minutes > 0 && `warm for ${Math.ceil(state.warm_minutes)} min`,
    !state.is_group && "in ComfyUI's own process",
  ].filter(Boolean);
  return element(
    "div",
    {},
    element("b", {}, `${state.plan} on ${state.devices}`),
    element("div", { class: "xdit-faint" }, state.why ?? (state.is_group ? "as set in xDiT Backend" : "")),
    element("div", { class: "xdit-faint" }, facts.join(" · ")),
    job?.steps ? bar(job.step / job.steps, "time") : null,
  );
}

function card(rank, isGroup) {
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
      isGroup ? element("a", { href: logAddress(rank.rank), target: "_blank" }, "log ↗") : null,
    ),
    rank.doing ? element("div", { class: "xdit-faint" }, rank.doing) : null,
  );
}

function details(state) {
  const link = state.link ? `link ${(state.link / 1e9).toPrecision(2)} GB/s · ${Math.round(state.latency * 1e6)} µs` : "";
  return element(
    "div",
    {},
    ...(state.warnings ?? []).map((line) => element("div", { class: "xdit-note" }, line)),
    state.last_error ? element("div", { class: "xdit-note error" }, `last error: ${state.last_error}`) : null,
    element("div", { class: "xdit-faint" }, link),
  );
}

function render(container) {
  const live = element("div");
  const said = element("div", { class: "xdit-faint xdit-said" });
  const table = element("div");
  const button = (label, name, kind = "") =>
    element("button", { class: `xdit-button ${kind}`, "data-action": name, onclick: async () => say(await act(name)) }, label);
  const say = (answer) => (said.textContent = answer.error ?? answer.done);
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
        button("Free memory", "free"),
        button("Stop group", "stop", "danger"),
        button("Restart", "restart"),
        element("button", { class: "xdit-button", "data-action": "plans", onclick: showPlans }, "Plans…"),
      ),
      said,
      table,
    ),
  );
  const show = (state) =>
    live.replaceChildren(heading(state), summary(state), ...state.ranks.map((rank) => card(rank, state.is_group)), details(state));
  return watch(show, { closely: true });
}

let leave = () => {};

app.registerExtension({
  name: "CogVideoX-xDiT.Panel",
  setup() {
    app.extensionManager.registerSidebarTab({
      id: "cogvideox-xdit",
      icon: "pi pi-server",
      title: "GPUs",
      tooltip: "The processes of the xDiT group: state, memory, plans",
      type: "custom",
      render: (container) => {
        leave();
        leave = render(container);
      },
      destroy: () => leave(),
    });
  },
});
