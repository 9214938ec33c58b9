// The planner's table for the model, size and devices of the open workflow. A click on a plan fills xDiT Backend.
import { bar, element, gib, seconds } from "./elements.js";
import { nodes, question, setValue } from "./graph.js";
import { plans } from "./group.js";
import { say } from "./words.js";

export async function planTable() {
  const table = await plans(question());
  if (table.error) return element("div", { class: "xdit-note" }, table.error);
  const [width, height, length] = table.size;
  const isTile = table.kind === "upscale", facts = { ...table, width, height, length };
  const what = isTile
    ? say("{model}, tiles of {width}×{height}, {length} frames, on {devices}", facts)
    : say("{model}, {width}×{height}, {length} frames, on {devices}", facts);
  const most = Math.max(...table.rows.map((row) => row.relative));
  const room = table.free_memory ?? Math.max(...table.rows.map((row) => row.memory));
  return element(
    "div",
    { class: "xdit-plans" },
    element("div", { class: "xdit-faint" }, what),
    element("div", { class: "xdit-faint" }, say("auto: {reason}", table)),
    isTile ? element("div", { class: "xdit-faint" }, say("The times are of one of many tiles, which replicas share.")) : null,
    ...table.rows.map((row) => planRow(row, most, room, isTile)),
    table.rates ? element("div", { class: "xdit-faint" }, table.rates) : null,
  );
}

function planRow(row, most, room, isTile) {
  const time = row.seconds === null ? `${row.relative.toFixed(2)}×` : timeOf(row, isTile);
  const marks = [row.chosen && "auto", !row.exact && say("not exact"), !row.fits && say("does not fit")].filter(Boolean);
  const kind = row.fits ? "" : "xdit-unfit";
  return element(
    "button",
    { class: `xdit-card xdit-plan ${kind}`, title: say("Fill xDiT Backend with this plan"), onclick: () => fill(row) },
    element("div", { class: "xdit-row" }, element("b", {}, row.plan), element("span", {}, marks.join(", "))),
    element("div", { class: "xdit-row" }, bar(row.relative / most, "time"), element("span", {}, time)),
    element("div", { class: "xdit-row" }, bar(row.memory / room), element("span", {}, `${gib(row.memory)} GiB`)),
  );
}

function timeOf(row, isTile) {
  const time = { time: seconds(row.seconds) };
  return isTile ? say("{time} a tile", time) : say("{time} a step", time);
}

function fill(row) {
  for (const node of nodes("XDiTBackend")) {
    setValue(node, "plan", row.plan);
    setValue(node, "devices", row.devices);
  }
}
